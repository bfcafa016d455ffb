"""Distance of each model's tensor to the base's, measured on the slices that the merge reads anyway.

Equality is exact (a difference usually shows in the first few bytes). The distance is estimated from a sample of
blocks, chosen by their position alone.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from modelfuse.kernels import Bytes, Extent, Measured, Pass, PassStep, Procedure, SpanState, Work, steps_of
from modelfuse.kernels.arrays import plain
from modelfuse.kernels.compiled import merge_loops
from modelfuse.kernels.compiled.direct_reads import DirectReads, block_of
from modelfuse.kernels.compiled.scratch import inputs_of, lay_out
from modelfuse.kernels.jit.code_cache import prepare
from modelfuse.kernels.jit.compile import compile_kernel

Array = np.ndarray[Any, Any]

#: Elements per block, and running sums. They determine the estimate, so they are independent of other kernels'.
BLOCK, LANES = 1024, 16
#: Tensors of up to this many elements are measured whole; of larger ones, at least this many are sampled.
LEAST = 1 << 16
#: The largest stride between sampled blocks: odd, so that with row lengths of a power of two all columns are sampled.
WIDEST = 63


def stride_of(size: int) -> int:
    """The stride between the sampled blocks of a tensor of ``size`` elements; odd.

    >>> stride_of(1000), stride_of(300_000), stride_of(10**9)
    (1, 5, 63)
    """
    return min(size // LEAST, WIDEST) | 1


@dataclass
class SpanDistances:
    """Distances to the base within one span.

    Attributes:
        first: The index of the span's first element.
        differs: bool, shape (models,): whether any element differs from the base's.
        squares: float64, shape (models + 1,): sums of squares of the differences to the base, and of the base itself,
            over the sampled blocks.
    """

    first: int
    differs: Array
    squares: Array


def measured(procedure: Procedure, work: Work) -> Procedure:
    """Wrap a procedure so that its writing pass also measures the distances to the base.

    The finding of a span of that pass is a :class:`Measured`, from which the worker takes the distances.

    Args:
        procedure: The procedure that merges a tensor.
        work: Its work, which has a base.
    """
    pass_ = next(procedure)
    while True:
        found = yield MeasuredPass(pass_, work) if pass_.writes else pass_
        try:
            pass_ = procedure.send(found)
        except StopIteration:
            return


class Seen(NamedTuple):
    """The distances of a span so far, as the kernel takes them.

    Attributes:
        differs: bool, shape (models,): see :class:`SpanDistances`.
        squares: float64, shape (models + 1,): see :class:`SpanDistances`.
        rows: float64, shape (3, BLOCK): scratch.
        files: Where the elements are read from.
    """

    differs: Array
    squares: Array
    rows: Array
    files: DirectReads


@dataclass
class MeasuredState:
    """The state of a span: that of the wrapped pass, and a laid-out :class:`Seen`."""

    inner: SpanState
    seen: Any
    first: int | None = None
    step: PassStep | None = None

    @property
    def bad(self) -> Array:
        """The counts of non-finite elements."""
        return self.inner.bad


class MeasuredPass:
    """Wraps a pass to measure distances on its slices, which come in order within a span."""

    def __init__(self, inner: Pass, work: Work) -> None:
        self._inner, self._inputs = inner, inputs_of(work)
        self._sources, self._models, self._stride = work.sources, work.models, stride_of(work.size)

    @property
    def writes(self) -> bool:
        """As the wrapped pass."""
        return self._inner.writes

    @property
    def span(self) -> int | None:
        """As the wrapped pass, if it has one."""
        return getattr(self._inner, "span", None)

    def steps(self, state: MeasuredState, first: int, count: int, most: int) -> Iterator[PassStep]:
        """As the wrapped pass; only steps that write are measured."""
        for step in steps_of(self._inner, state.inner, first, count, most):
            state.step = step
            yield step

    def start(self) -> MeasuredState:
        """Begin a span."""
        files = DirectReads.of(len(self._sources))
        seen = Seen(np.zeros(self._models, np.bool_), np.zeros(self._models + 1), np.empty((3, BLOCK)), files)
        return MeasuredState(self._inner.start(), prepare(seen))

    def read_from(self, state: MeasuredState, extents: Sequence[Extent]) -> bool:
        """As the wrapped pass; the distances are read from the same files."""
        if not self._inner.read_from(state.inner, extents):
            return False
        state.seen.value.files.read_from(extents, self._sources)
        return True

    def apply(self, state: MeasuredState, first: int, count: int, raws: Bytes, out: Bytes) -> None:
        """Measure the slice, and run the wrapped pass on it."""
        if state.step is None or state.step.writes:
            state.first = first if state.first is None else state.first
            with state.seen.value.files.at(first):
                measure(lay_out(self._inputs, raws, out), self._stride, first, count, state.seen)
        self._inner.apply(state.inner, first, count, raws, out)

    def finish(self, state: MeasuredState) -> Measured:
        """End a span."""
        assert state.first is not None
        distances = SpanDistances(state.first, state.seen.value.differs, state.seen.value.squares)
        return Measured(self._inner.finish(state.inner), distances)


class Distance(NamedTuple):
    """The distance of one model's tensor to the base's.

    Attributes:
        equal: Whether all elements equal the base's.
        relative: The estimate of ‖x − b‖ / ‖b‖; None where it is undefined, as for a base of zeros.
    """

    equal: bool
    relative: float | None


def pack(found: Sequence[Distance]) -> array[float]:
    """Pack distances into a few bytes, as a model may have a hundred thousand tensors.

    >>> list(unpack(pack([Distance(False, 0.5), Distance(True, 0.0), Distance(False, None)])))
    [Distance(equal=False, relative=0.5), Distance(equal=True, relative=0.0), Distance(equal=False, relative=None)]
    """
    return array("d", (-1.0 if each.equal else math.nan if each.relative is None else each.relative for each in found))


def unpack(packed: array[float]) -> list[Distance]:
    """The distances that :func:`pack` has packed; the relative distance of equal tensors is 0."""
    return [
        Distance(value < 0, 0.0) if value < 0 else Distance(False, None if math.isnan(value) else value)
        for value in packed
    ]


def distances(spans: Sequence[SpanDistances]) -> list[Distance]:
    """The distance of each model.

    Args:
        spans: The distances of all spans of a tensor, in any order.
    """
    if not spans:
        return []
    # Called once per tensor: for so few numbers, Python floats are faster than numpy.
    ordered = sorted(spans, key=lambda span: span.first)
    differs = [any(own) for own in zip(*(span.differs.tolist() for span in ordered), strict=True)]
    *squares, base = map(sum, zip(*(span.squares.tolist() for span in ordered), strict=True))
    return [
        Distance(not differ, math.sqrt(square) / math.sqrt(base) if base and math.isfinite(square / base) else None)
        for differ, square in zip(differs, squares, strict=True)
    ]


@compile_kernel(plain=plain.measure)
def measure(data: merge_loops.Stored, stride: int, first: int, count: int, seen: Seen) -> None:
    """Compare each model with the base until a difference is found, and sum squares over the sampled blocks.

    Args:
        data: The slice; the base is the last source.
        stride: The stride between sampled blocks.
        first: The index of the slice's first element in the tensor, a multiple of BLOCK.
        count: The number of elements.
        seen: Updated in place.
    """
    codes, raws, deltas, models = data.inputs.codes, data.raws, data.inputs.deltas, data.inputs.models
    rows, differs, squares = seen.rows, seen.differs, seen.squares
    for model in range(models):
        start = 0
        while start < count and not differs[model]:
            size = min(BLOCK, count - start)
            column = block_of(seen.files, raws, model, start, size)
            if deltas[model]:
                differs[model] = _any(codes[model], raws[model], column, size, rows[0])
                start += size
                continue
            block_of(seen.files, raws, models, start, size)
            if codes[model] == codes[models]:
                width = merge_loops.width_of(codes[model])
                begin, end = column * width, (column + size) * width
                differs[model] = _differ(raws[model][begin:end], raws[models][begin:end])
            else:
                merge_loops.decode(codes[models], raws[models], column, size, rows[1])
                differs[model] = _unequal(codes[model], raws[model], column, size, rows[0], rows[1])
            start += size
    block = first // BLOCK
    for start in range((-block) % stride * BLOCK, count, stride * BLOCK):
        size = min(BLOCK, count - start)
        column = block_of(seen.files, raws, models, start, size)
        merge_loops.decode(codes[models], raws[models], column, size, rows[1])
        squares[models] += _sum_of_squares(rows[1], size, rows[2])
        for model in range(models):
            block_of(seen.files, raws, model, start, size)
            merge_loops.decode(codes[model], raws[model], column, size, rows[0])
            if not deltas[model]:
                for i in range(size):
                    rows[0, i] -= rows[1, i]
            squares[model] += _sum_of_squares(rows[0], size, rows[2])


@compile_kernel
def _differ(one: Array, other: Array) -> Any:
    ones, others = one.view(np.uint16), other.view(np.uint16)
    found = np.uint16(0)
    for i in range(ones.size):
        found |= ones[i] ^ others[i]
    return found != 0


@compile_kernel
def _any(code: int, raw: Array, start: int, size: int, row: Array) -> bool:
    merge_loops.decode(code, raw, start, size, row)
    found = False
    for i in range(size):
        found |= row[i] != 0
    return found


@compile_kernel
def _unequal(code: int, raw: Array, start: int, size: int, row: Array, base: Array) -> bool:
    merge_loops.decode(code, raw, start, size, row)
    found = False
    for i in range(size):
        found |= row[i] != base[i]
    return found


@compile_kernel
def _sum_of_squares(row: Array, size: int, lanes: Array) -> float:
    """The sum of squares, in lanes folded in a fixed order: bit-identical on any processor."""
    for i in range(size, -(-size // LANES) * LANES):
        row[i] = 0.0
    for lane in range(LANES):
        lanes[lane] = 0.0
    for i in range(0, size, LANES):
        for lane in range(LANES):
            lanes[lane] += row[i + lane] * row[i + lane]
    total = 0.0
    for lane in range(LANES):
        total += lanes[lane]
    return total
