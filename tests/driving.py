"""Run the passes of a procedure like a merge does, on arrays in memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from modelfuse.dtypes import BF16, F16, F32, F64, DType
from modelfuse.kernels import Extent, Pass, Procedure, Work
from modelfuse.kernels.compiled import merge_loops
from modelfuse.kernels.compiled.backend import merge_procedure
from modelfuse.methods.applied import Applied

Array = npt.NDArray[Any]

#: Slices start at multiples of this many elements, the chunks of partial sums.
GRAIN = merge_loops.CHUNK
FLOATS = {"float32": F32, "float16": F16, "bfloat16": BF16, "float64": F64}
STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def bfloat16(values: Array) -> npt.NDArray[np.uint16]:
    """Bit patterns of the nearest bfloat16, ties to even, by integer arithmetic on exact values; NaN stays NaN.

    The neighbours of a value are the float32 with 16 low bits cleared and the next one; which of them is nearer
    is decided in float64, or exactly for the float64 that float32 rounds.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # A signalling NaN becomes a quiet one.
        wide = np.where(np.isnan(values), 0.0, values).astype(np.float64)
        single = wide.astype(np.float32)
    # Towards zero, so that the 16 high bits are those of the neighbour below in magnitude.
    bits = single.view(np.uint32).astype(np.int64)
    bits -= (np.abs(single.astype(np.float64)) > np.abs(wide)).astype(np.int64)
    below = (bits >> 16).astype(np.uint32)
    above = below + np.uint32(1)
    with np.errstate(invalid="ignore"):
        lower, upper = ((bits << np.uint32(16)).view(np.float32).astype(np.float64) for bits in (below, above))
    # The first value beyond the range is rounded as if the exponent were unbounded.
    upper = np.where(np.abs(upper) < 2.0**128, upper, np.copysign(2.0**128, wide))
    with np.errstate(invalid="ignore"):
        to_lower, to_upper = np.abs(wide - lower), np.abs(upper - wide)
    up = (to_upper < to_lower) | ((to_upper == to_lower) & (below % 2 == 1))
    result = np.where(up, above, below).astype(np.uint16)
    infinite = np.where(np.signbit(wide), 0xFF80, 0x7F80).astype(np.uint16)
    result = np.where(np.abs(wide) >= 2.0**128, infinite, result)
    return np.where(np.isnan(values), np.uint16(0x7FC0), result).astype(np.uint16)


def store(values: Array, dtype: DType) -> Array:
    """Convert values to their stored type; bfloat16 as uint16."""
    if dtype is BF16:
        return bfloat16(values)
    with np.errstate(over="ignore"):
        return values.astype(STORED[dtype.name])


def load(stored: Array, dtype: DType, compute: str) -> Array:
    """Convert stored values to the compute type."""
    if dtype is BF16:
        with np.errstate(invalid="ignore"):
            return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(compute)
    return stored.astype(compute)


def work_on(
    stored: Sequence[Array], sources: Sequence[DType], method: Applied, has_base: bool, out: DType, name: str = "w"
) -> Work:
    """The work of merging these arrays."""
    return Work(name, stored[0].size, tuple(sources), has_base, out, method)


def walk(
    work: Work,
    stored: Sequence[Array],
    pass_: Pass,
    first: int,
    count: int,
    step: int,
    out: Array,
    extents: Sequence[Extent] = (),
) -> tuple[Any, Array]:
    """Process one span in slices of ``step`` elements; returns the finding and the counts of non-finite elements."""
    assert first % GRAIN == 0
    assert step % GRAIN == 0
    state = pass_.start()
    reads = bool(extents) and pass_.read_from(state, extents)
    assert reads or not extents or hasattr(pass_, "steps")  # A few elements are read by arrays.
    sizes = [source.bytes for source in work.sources]
    # Bytes beyond the slice have arbitrary values, as in a reused buffer.
    raws = np.full((len(stored), step * max(sizes)), 0xA5, np.uint8)
    buffer = np.full(step * work.out.bytes, 0x5A, np.uint8)
    for start in range(first, first + count, step):
        length = min(step, first + count - start)
        for raw, values, size in zip(raws, stored, sizes, strict=True) if not reads else ():
            raw[: length * size] = values[start : start + length].view(np.uint8)
        pass_.apply(state, start, length, raws, buffer)
        if pass_.writes:
            begin = start * work.out.bytes
            out[begin : begin + length * work.out.bytes] = buffer[: length * work.out.bytes]
    bad = state.bad.copy()
    return pass_.finish(state), bad


def drive(
    work: Work,
    stored: Sequence[Array],
    spans: Sequence[int] | None = None,
    step: int = GRAIN,
    procedure: Procedure | None = None,
    passes: list[tuple[Pass, Any]] | None = None,
    extents: Sequence[Extent] = (),
) -> tuple[Array, Array]:
    """Merge arrays; returns the stored result and the counts of non-finite elements of the pass that writes.

    Args:
        work: The merge.
        stored: The stored models, the base last if there is one.
        spans: The first elements of all spans but the first one.
        step: Elements per slice.
        procedure: The procedure to run; None: that of the merge.
        passes: Receives every pass and its spans' findings.
        extents: The file extents of the models, if the passes are to read them by themselves.
    """
    out = np.zeros(work.size * work.out.bytes, np.uint8)
    edges = [0, *(spans or ()), work.size]
    procedure = procedure or merge_procedure(work)
    pass_ = next(procedure)
    while True:
        walked = [walk(work, stored, pass_, first, stop - first, step, out, extents) for first, stop in pairwise(edges)]
        found = [each for each, _ in walked]
        if fold := getattr(pass_, "fold", None):
            found = [functools.reduce(fold, found)]
        bad = np.sum([each for _, each in walked], axis=0)
        if passes is not None:
            passes.append((pass_, found))
        try:
            pass_ = procedure.send(found)
        except StopIteration:
            return out.view(STORED[work.out.name]), bad
