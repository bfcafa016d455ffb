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
from functools import partial

from threads import run_all

PIECE = 8 << 20
#: Bytes written at a time, for the reason that modelfuse has (`journal.py`): a copy at its best.
WRITTEN = 512 << 10


def main(output: str, threads: int, inputs: list[str]) -> None:
    """Copy: see the module's docstring."""
    sources = [os.open(path, os.O_RDONLY) for path in inputs]
    sizes = [os.fstat(source).st_size for source in sources]
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    starts = [range(number * PIECE, max(sizes), threads * PIECE) for number in range(threads)]
    run_all([partial(_work, each, sources, target, sizes[-1]) for each in starts])
    os.fsync(target)
    for descriptor in [*sources, target]:
        os.close(descriptor)


def _work(starts: range, sources: list[int], target: int, size: int) -> None:
    buffer = mmap.mmap(-1, PIECE)
    for start in starts:
        for source in sources:
            os.preadv(source, [buffer], start)
        if (length := min(PIECE, size - start)) > 0:
            _write(target, memoryview(buffer)[:length], start)


def _write(target: int, data: memoryview, start: int) -> None:
    while data:
        written = os.pwrite(target, data[:WRITTEN], start)
        data, start = data[written:], start + written


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
