"""A plain parallel read: how fast the disk gives the bytes of some files, to a program that does nothing else.

Run as a process of its own, like the merges. The files are cut into blocks, which threads take one after the other,
each into one aligned buffer that is used again.

    python benchmarks/reading.py THREADS BLOCK INPUT...

Only the standard library is used, so that starting up costs as little as it can.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading

from threads import run_all


def main(threads: int, block: int, inputs: list[str]) -> None:
    """Read: see the module's docstring."""
    sources = [os.open(path, os.O_RDONLY) for path in inputs]
    blocks = [(source, start) for source in sources for start in range(0, os.fstat(source).st_size, block)]
    todo, lock = iter(blocks), threading.Lock()

    def work() -> None:
        buffer = mmap.mmap(-1, block)
        while True:
            with lock:
                taken = next(todo, None)
            if taken is None:
                return
            os.preadv(taken[0], [buffer], taken[1])

    run_all([work] * threads)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
