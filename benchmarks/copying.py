"""A plain copy of the same bytes: the least that any merge must do.

Run as a process of its own, like the merges, so that starting an interpreter is counted alike. It
reads every byte of every input once and writes as many bytes as one input has, with as many threads
as the merge has, 8 MiB at a time, into buffers that are used again; the output is synced to the disk
at the end, as a careful merge does. For each 8 MiB of output a thread reads the same range of every
input and then writes the last one read. There is no arithmetic and no other work.

    python benchmarks/copying.py OUTPUT THREADS INPUT...

Only the standard library is used, so that starting up costs as little as it can.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading

PIECE = 8 << 20


def main(output: str, threads: int, inputs: list[str]) -> None:
    """Copy: see the module's docstring."""
    sources = [os.open(path, os.O_RDONLY) for path in inputs]
    sizes = [os.fstat(source).st_size for source in sources]
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    errors: list[OSError] = []
    workers = []
    for number in range(threads):
        starts = range(number * PIECE, max(sizes), threads * PIECE)
        workers.append(threading.Thread(target=_work, args=(starts, sources, target, sizes[-1], errors)))
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    os.fsync(target)
    for descriptor in [*sources, target]:
        os.close(descriptor)


def _work(starts: range, sources: list[int], target: int, size: int, errors: list[OSError]) -> None:
    buffer = mmap.mmap(-1, PIECE)
    try:
        for start in starts:
            for source in sources:
                os.preadv(source, [buffer], start)
            if (length := min(PIECE, size - start)) > 0:
                _write(target, memoryview(buffer)[:length], start)
    except OSError as error:
        errors.append(error)


def _write(target: int, data: memoryview, start: int) -> None:
    while data:
        written = os.pwrite(target, data, start)
        data, start = data[written:], start + written


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
