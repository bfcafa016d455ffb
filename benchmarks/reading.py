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


def main(threads: int, block: int, inputs: list[str]) -> None:
    """Read: see the module's docstring."""
    sources = [os.open(path, os.O_RDONLY) for path in inputs]
    blocks = [(source, start) for source in sources for start in range(0, os.fstat(source).st_size, block)]
    todo, errors = iter(blocks), list[OSError]()
    lock = threading.Lock()

    def work() -> None:
        buffer = mmap.mmap(-1, block)
        try:
            while True:
                with lock:
                    taken = next(todo, None)
                if taken is None:
                    return
                os.preadv(taken[0], [buffer], taken[1])
        except OSError as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
