"""How far each model's tensor is from the base's, told from slices that were read anyway.

Whether they are equal is told exactly; where they are not, as for nearly all tensors, the first few bytes show it.
The distance is an estimate from some blocks, chosen by the numbers of their elements alone.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from modelfuse.kernels import Bytes, Extent, Measured, Pass, Procedure, SpanState, Step, Work, steps_of
from modelfuse.kernels.arrays import plain
from modelfuse.kernels.compiled import merge_loops
from modelfuse.kernels.compiled.direct_reads import DirectReads, block_of
from modelfuse.kernels.compiled.scratch import inputs_of, lay_out
from modelfuse.kernels.jit.code_cache import prepare
from modelfuse.kernels.jit.compile import compile_kernel

Array = np.ndarray[Any, Any]

#: Elements a block, and running sums: they are part of what is measured, so they are not those of other kernels.
BLOCK, LANES = 1024, 16
#: A tensor of fewer elements is measured whole; of any other, so many at least.
LEAST = 1 << 16
#: At most every so-manieth block: odd, so that rows of a power of two are seen at all their columns.
WIDEST = 63


def stride_of(size: int) -> int:
    """Every how-manieth block of a tensor is measured; odd.

    >>> stride_of(1000), stride_of(300_000), stride_of(10**9)
    (1, 5, 63)
    """
    return min(size // LEAST, WIDEST) | 1


@dataclass
class SpanDistances:
    """What a span says of the models' tensors and of the base's.

    Attributes:
        first: The number of the span's first element.
        differs: bool, shape (models,): whether any element is not the base's.
        squares: float64, shape (models + 1,): of the differences to the base, and of the base itself, summed over
            the measured blocks.
    """

    first: int
    differs: Array
    squares: Array


def measured(procedure: Procedure, work: Work) -> Procedure:
    """The same procedure, whose last pass tells beside all else how far the models are from the base.

    What a span of that pass finds is a :class:`Measured`; whoever walks it takes the distances out of it.

    Args:
        procedure: Merges a tensor.
        work: What it does; there is a base.
    """
    pass_ = next(procedure)
    while True:
        found = yield MeasuredPass(pass_, work) if pass_.writes else pass_
        try:
            pass_ = procedure.send(found)
        except StopIteration:
            return


class Seen(NamedTuple):
    """What is known of the distances so far.

    Attributes:
        differs: bool, shape (models,): as in :class:`SpanDistances`.
        squares: float64, shape (models + 1,): the same.
        rows: float64, shape (3, BLOCK): scratch.
        files: Where the elements are read from.
    """

    differs: Array
    squares: Array
    rows: Array
    files: DirectReads


@dataclass
class MeasuredState:
    """A span under way: the state of the pass, and a :class:`Seen`, laid out."""

    inner: SpanState
    seen: Any
    first: int | None = None
    step: Step | None = None

    @property
    def bad(self) -> Array:
        """The counts of non-finite elements."""
        return self.inner.bad


class MeasuredPass:
    """A pass that also looks at the slices that it is given; those of a span come in order."""

    def __init__(self, inner: Pass, work: Work) -> None:
        self._inner, self._inputs = inner, inputs_of(work)
        self._sources, self._models, self._stride = work.sources, work.models, stride_of(work.size)

    @property
    def writes(self) -> bool:
        """As the pass."""
        return self._inner.writes

    @property
    def span(self) -> int | None:
        """As the pass, if it has any."""
        return getattr(self._inner, "span", None)

    def steps(self, state: MeasuredState, first: int, count: int, most: int) -> Iterator[Step]:
        """As the pass; what it does not write is not looked at."""
        for step in steps_of(self._inner, state.inner, first, count, most):
            state.step = step
            yield step

    def start(self) -> MeasuredState:
        """Begin a span."""
        files = DirectReads.of(len(self._sources))
        seen = Seen(np.zeros(self._models, np.bool_), np.zeros(self._models + 1), np.empty((3, BLOCK)), files)
        return MeasuredState(self._inner.start(), prepare(seen))

    def read_from(self, state: MeasuredState, extents: Sequence[Extent]) -> bool:
        """Read the same as the pass, if that reads by itself."""
        if not self._inner.read_from(state.inner, extents):
            return False
        state.seen.value.files.read_from(extents, self._sources)
        return True

    def apply(self, state: MeasuredState, first: int, count: int, raws: Bytes, out: Bytes) -> None:
        """Look at the slice, and let the pass work on it."""
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
    """How far one model's tensor is from the base's.

    Attributes:
        equal: Whether it is the base's, element by element.
        relative: The estimate of ‖x − b‖ / ‖b‖; None where there is no such number, as for a base of zeros.
    """

    equal: bool
    relative: float | None


def pack(found: Sequence[Distance]) -> array[float]:
    """The same in a few bytes, for a model may have a hundred thousand tensors.

    >>> list(unpack(pack([Distance(False, 0.5), Distance(True, 0.0), Distance(False, None)])))
    [Distance(equal=False, relative=0.5), Distance(equal=True, relative=0.0), Distance(equal=False, relative=None)]
    """
    return array("d", (-1.0 if each.equal else math.nan if each.relative is None else each.relative for each in found))


def unpack(packed: array[float]) -> list[Distance]:
    """What was packed; the distance of what is equal is zero."""
    return [
        Distance(value < 0, 0.0) if value < 0 else Distance(False, None if math.isnan(value) else value)
        for value in packed
    ]


def distances(spans: Sequence[SpanDistances]) -> list[Distance]:
    """The distance of each model.

    Args:
        spans: What was found in all spans of a tensor, in any order.
    """
    if not spans:
        return []
    # Of a small tensor this is done as often as merging: Python's own numbers are faster than numpy's few.
    ordered = sorted(spans, key=lambda span: span.first)
    differs = [any(own) for own in zip(*(span.differs.tolist() for span in ordered), strict=True)]
    *squares, base = map(sum, zip(*(span.squares.tolist() for span in ordered), strict=True))
    return [
        Distance(not differ, math.sqrt(square) / math.sqrt(base) if base and math.isfinite(square / base) else None)
        for differ, square in zip(differs, squares, strict=True)
    ]


@compile_kernel(plain=plain.measure)
def measure(data: merge_loops.Stored, stride: int, first: int, count: int, seen: Seen) -> None:
    """Compare every model with the base until a difference is found, and sum the squares of the chosen blocks.

    Args:
        data: The slice; the base is the last source.
        stride: Every how-manieth block is chosen.
        first: The number of the first element in the tensor, a multiple of BLOCK.
        count: The number of elements.
        seen: Updated, and added to.
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
    """In lanes folded in a fixed order: the same bits on any processor."""
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
