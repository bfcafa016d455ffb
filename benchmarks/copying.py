"""A plain copy of the same bytes: the least work of any merge.

It is a separate process, like the merges, so that the start of an interpreter counts for both. It reads every byte of
every input once and writes as many bytes as one input has, with as many threads as the merge, 8 MiB at a time, into
reused buffers; the output is synced at the end. For each 8 MiB of output, a thread reads the same range of every input
and then writes the last one.

    python benchmarks/copying.py OUTPUT THREADS INPUT...

Only the standard library is used, for a short start-up time.
"""

from __future__ import annotations

import mmap
import os
import sys
from functools import partial

from threads import run_all

PIECE = 8 << 20
#: Bytes per write, as in modelfuse (see ``storage/local/journal.py``): larger writes are slower.
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
