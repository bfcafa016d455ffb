"""Time the compiled kernels alone, without files.

    python benchmarks/kernels.py --elements 16 --threads 1 2

The passes of each method process one tensor, slice by slice, in the given numbers of threads. Each thread has a buffer
with the stored bytes of one slice, which is used for every slice. Rates count the bytes of each source once and those
of the result once, for any number of passes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from works import WORKS
from works import Work as Merge

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modelfuse.dtypes import BF16, F16, F32, F64, DType
from modelfuse.kernels import Bytes, Pass, Work
from modelfuse.kernels.backends import Device, choose
from modelfuse.kernels.kernel import Kernel
from modelfuse.methods.registry import METHODS, apply

DTYPES = {"bfloat16": BF16, "float16": F16, "float32": F32, "float64": F64}
SLICE = 1 << 17
#: Elements of a span, as in a merge.
SPAN = 1 << 22


def main(words: Sequence[str] | None = None) -> None:
    """Time the methods and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=WORKS, default=list(WORKS), metavar="METHOD")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--elements", type=int, default=16, help="in units of 2²⁰ (16)")
    parser.add_argument("--unchanged", type=float, default=0.0, help="the share of elements equal to the base's (0)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args(words)
    title = f"kernels alone, {options.elements} Mi elements, {options.dtype}"
    table = Table(title=title, title_justify="left")
    for heading in ("method", "threads", "GB/s", "ms", "ms by pass"):
        table.add_column(heading, justify="left" if heading in ("method", "ms by pass") else "right")
    kernel = choose(Device("np"))
    for name in options.methods:
        work = reference_work(WORKS[name], options.elements << 20, DTYPES[options.dtype])
        stored = stored_slice(work, SLICE, options.unchanged)
        for threads in options.threads:
            time_passes(work, 1, kernel, stored)
            times = [time_passes(work, threads, kernel, stored) for _ in range(options.repeat)]
            # The fastest whole run is reported, so that its passes add up.
            best = min(times, key=lambda each: sum(each.values()))
            seconds = sum(best.values())
            size = work.size * (len(work.sources) + 1) * work.out.bytes
            passes = ", ".join(f"{each} {1000 * took:.1f}" for each, took in best.items())
            table.add_row(name, str(threads), f"{size / 1e9 / seconds:.1f}", f"{1000 * seconds:.1f}", passes)
    Console().print(table)


def reference_work(merge: Merge, size: int, dtype: DType) -> Work:
    """A merge of one tensor with the settings of the reference work."""
    method = METHODS[merge.method]
    weights = (1.0 / merge.models,) * merge.models
    applied = apply(method.sparsifier, method.combination, weights, {"normalize": True, **method.defaults})
    return Work("tensor", size, (dtype,) * (merge.models + merge.has_base), merge.has_base, dtype, applied)


def time_passes(work: Work, threads: int, kernel: Kernel, stored: Bytes) -> dict[str, float]:
    """Seconds of each pass, by the name of its class; ``stored`` is used for every slice."""
    buffers, step = [], stored.shape[1] // work.sources[0].bytes
    for _ in range(threads):
        raws = kernel.buffer(stored.shape)
        raws[:] = stored
        buffers.append((raws, kernel.buffer((work.out.bytes * step,))))
    spans = [(first, min(SPAN, work.size - first)) for first in range(0, work.size, SPAN)]
    times: dict[str, float] = {}
    procedure = kernel.merge(work)
    pass_ = next(procedure)
    with ThreadPoolExecutor(threads) as pool:
        while True:
            start = time.perf_counter()
            tasks = [pool.submit(_walk, pass_, spans[n::threads], step, *buffers[n]) for n in range(threads)]
            found = [each for task in tasks for each in task.result()]
            try:
                following = procedure.send(found)
            except StopIteration:
                times[type(pass_).__name__] = time.perf_counter() - start
                return times
            times[type(pass_).__name__] = time.perf_counter() - start
            pass_ = following


def _walk(pass_: Pass, spans: Sequence[tuple[int, int]], step: int, raws: Bytes, out: Bytes) -> list[Any]:
    found = []
    for first, count in spans:
        state = pass_.start()
        for start in range(first, first + count, step):
            pass_.apply(state, start, min(step, first + count - start), raws, out)
        found.append(pass_.finish(state))
    return found


def stored_slice(work: Work, step: int, unchanged: float = 0.0) -> Bytes:
    """A stored slice of every source: fine-tunes and their base.

    Args:
        work: The merge.
        step: Elements of the slice.
        unchanged: The share of elements that equal the base's.

    Returns:
        uint8, shape (sources, bytes).
    """
    draw = np.random.default_rng(0)
    base = draw.standard_normal(step) * 0.02
    rows = [
        base + draw.standard_normal(step) * 0.001 * (draw.random(step) >= unchanged)
        for _ in work.sources[: work.models]
    ]
    rows += [base] if work.has_base else []
    return np.stack([_encode(row, source) for row, source in zip(rows, work.sources, strict=True)])


def _encode(values: np.ndarray[Any, np.dtype[np.float64]], dtype: DType) -> Bytes:
    if dtype is BF16:
        # Truncated instead of rounded, which makes no difference here.
        bits = values.astype("<f4").view(np.uint32) >> np.uint32(16)
        return bits.astype("<u2").view(np.uint8)
    return values.astype({F16: "<f2", F32: "<f4", F64: "<f8"}[dtype]).view(np.uint8)


if __name__ == "__main__":
    main()
