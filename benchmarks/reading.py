"""A plain parallel read of some files, to measure the read rate of the disk.

It is a separate process, like the merges. Threads read the blocks of the files in order, each into an aligned buffer
that it reuses.

    python benchmarks/reading.py THREADS BLOCK INPUT...

Only the standard library is used, for a short start-up time.
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
