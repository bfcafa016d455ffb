"""Compiled passes along rows for divergences."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from modelfuse.kernels import Work
from modelfuse.kernels.compiled.direct_reads import BLOCK
from modelfuse.kernels.compiled.dot_products import LANES, add_values, fold_terms
from modelfuse.kernels.compiled.elementary import exp, exp_near_zero, key_of, log, log_near_one, of_key
from modelfuse.kernels.compiled.merge_loops import BlockBuffers, Stored, load
from modelfuse.kernels.compiled.passes import CompiledState, Walk
from modelfuse.kernels.divergence import RowSums, RowTables
from modelfuse.kernels.elementary import NEAR
from modelfuse.kernels.jit.code_cache import prepare
from modelfuse.kernels.jit.compile import compile_kernel
from modelfuse.kernels.lines import Accumulated, Lines, accumulate

Array = np.ndarray[Any, Any]


class Rows(NamedTuple):
    """What is known of rows, laid out; see :class:`modelfuse.kernels.divergence.RowTables`.

    Attributes:
        length: Elements per row.
        least: What is added to shares.
        shifts: float64, shape (2, rows).
        scales: float64, shape (2, rows).
        change: float64, shape (rows,).
    """

    length: int
    least: float
    shifts: Array
    scales: Array
    change: Array


class RowBuffers(NamedTuple):
    """A span's buffers.

    Attributes:
        wide: float64, shape (6, BLOCK): the elements of the model and of the base, their exponentials, and what is made
            of these.
        lanes: float64, shape (2, 2, LANES): running sums and their rounding errors.
    """

    wide: Array
    lanes: Array


@compile_kernel
def widen(data: Stored, buffers: BlockBuffers, size: int, wide: Array) -> None:
    """Store a block's elements of the model and of the base in float64."""
    x, base, ours, theirs = buffers.x[0], buffers.x[buffers.x.shape[0] - 1], wide[0], wide[1]
    for i in range(size):
        theirs[i] = np.float64(base[i]) if data.inputs.has_base else 0.0
        ours[i] = np.float64(x[i]) + theirs[i]


@compile_kernel
def add_exponentials(
    data: Stored, first: int, length: int, buffers: BlockBuffers, rows: Rows, own: RowBuffers, sums: Array, tops: Array
) -> None:
    """Sum the exponentials of a slice along rows.

    Args:
        data: The slice.
        first: The index of its first element in the tensor.
        length: The number of elements.
        buffers: The worker's buffers.
        rows: What is known of the rows.
        own: Further buffers.
        sums: float64, shape (rows, 2, 2): sums of the model and of the base, and their rounding errors.
        tops: float64, shape (2, 2, rows): the largest magnitudes and elements.
    """
    begin, wide, lanes = first // rows.length, own.wide, own.lanes
    lanes[:] = 0.0
    for start in range(0, length, BLOCK):
        size, stop = min(BLOCK, length - start), 0
        load(data, start, size, buffers, length)
        widen(data, buffers, size, wide)
        while stop < size:
            here = stop
            row, stop, ends = _piece(rows, first + start, here, size, length - start)
            _store_powers(rows, row, wide, here, stop)
            for source in range(2):
                add_values(wide[2 + source, here:stop], stop - here, lanes[source])
                _find_extremes(wide[source, here:stop], tops[:, source, row - begin])
            if ends:
                fold_terms(lanes, sums[row - begin])
                lanes[:] = 0.0


@compile_kernel
def _piece(rows: Rows, first: int, here: int, size: int, left: int) -> tuple[int, int, bool]:
    """The row of an element, where its elements in a block end, and whether those in the slice do.

    Args:
        rows: What is known of the rows.
        first: The index of the block's first element in the tensor.
        here: The index of the element in the block.
        size: The number of elements in the block.
        left: The number of elements in the slice from the block on.
    """
    row = (first + here) // rows.length
    end = (row + 1) * rows.length - first
    stop = min(size, end)
    return row, stop, stop == min(end, left)


# Loops over slices, from zero on: numba takes other indices for possibly negative ones, and the loops stay scalar.


@compile_kernel
def _store_powers(rows: Rows, row: int, wide: Array, here: int, stop: int) -> None:
    """Store exponentials; the model's are the base's times that of a small difference, where it is one."""
    ours, theirs, powers, others = wide[0, here:stop], wide[1, here:stop], wide[2, here:stop], wide[3, here:stop]
    shift, other_shift = rows.shifts[0, row], rows.shifts[1, row]
    _store_exponentials(theirs, other_shift, others)
    if not (shift == 0.0 and other_shift == 0.0):
        _store_exponentials(ours, shift, powers)
        return
    far = 0
    for i in range(ours.size):
        change = ours[i] - theirs[i]
        far += not abs(change) < NEAR
        powers[i] = others[i] * exp_near_zero(change)
    for i in range(ours.size if far else 0):
        if not abs(ours[i] - theirs[i]) < NEAR:
            powers[i] = exp(ours[i] - shift)


@compile_kernel
def _store_exponentials(values: Array, shift: float, out: Array) -> None:
    for i in range(values.size):
        out[i] = exp(values[i] - shift)


@compile_kernel
def _find_extremes(values: Array, tops: Array) -> None:
    """Update the largest magnitude and element, found as integers, as a loop over floats would not be vectorized."""
    magnitude, largest = key_of(tops[0]), key_of(tops[1])
    for i in range(values.size):
        magnitude, largest = max(magnitude, key_of(abs(values[i]))), max(largest, key_of(values[i]))
    tops[0], tops[1] = of_key(magnitude), of_key(largest)


@compile_kernel
def add_divergences(
    data: Stored, first: int, length: int, buffers: BlockBuffers, rows: Rows, own: RowBuffers, sums: Array
) -> None:
    """Sum the divergences of a slice along rows; ``sums``: float64, shape (rows, 1, 2)."""
    begin, wide, lanes = first // rows.length, own.wide, own.lanes[:1]
    lanes[:] = 0.0
    for start in range(0, length, BLOCK):
        size, stop = min(BLOCK, length - start), 0
        load(data, start, size, buffers, length)
        widen(data, buffers, size, wide)
        while stop < size:
            here = stop
            row, stop, ends = _piece(rows, first + start, here, size, length - start)
            _store_powers(rows, row, wide, here, stop)
            _store_divergences(rows, row, wide, here, stop)
            add_values(wide[4, here:stop], stop - here, lanes[0])
            if ends:
                fold_terms(lanes, sums[row - begin])
                lanes[:] = 0.0


@compile_kernel
def _store_divergences(rows: Rows, row: int, wide: Array, here: int, stop: int) -> None:
    """Store the terms of a piece of a row in ``wide[4]``."""
    ours, theirs, powers, others = wide[0, here:stop], wide[1, here:stop], wide[2, here:stop], wide[3, here:stop]
    terms, excesses, least, change, far = wide[4, here:stop], wide[5, here:stop], rows.least, rows.change[row], 0
    scale, other_scale = rows.scales[0, row], rows.scales[1, row]
    for i in range(ours.size):
        p, q = powers[i] * scale, others[i] * other_scale
        excess = least * (q - p) / (p * (q + least))
        far += not abs(excess) < NEAR
        terms[i] = (p + least) * (((ours[i] - theirs[i]) - change) + log_near_one(excess))
        excesses[i] = excess
    for i in range(ours.size if far else 0):
        if not abs(excesses[i]) < NEAR:
            p, q = powers[i] * scale, others[i] * other_scale
            terms[i] = (p + least) * log((p + least) / (q + least))


class _Rows(Walk):
    """A pass over rows of the model and of the base."""

    def __init__(self, work: Work, lines: Lines, tables: RowTables, least: float) -> None:
        super().__init__(work)
        self._length = lines.length
        self._known: Any = prepare(Rows(lines.length, least, *tables))

    def start(self) -> CompiledState:
        state = super().start()
        state.found = []
        state.own = prepare(RowBuffers(np.zeros((6, BLOCK)), np.empty((2, 2, LANES))))
        return state

    def _rows_in(self, first: int, count: int) -> int:
        """The number of rows that have elements in a slice."""
        return (first + count - 1) // self._length - first // self._length + 1


def _accumulated(line: int, sums: Array) -> Accumulated:
    return Accumulated(line, *np.moveaxis(sums, 2, 0).swapaxes(1, 2)[..., None])


class Exponentials(_Rows):
    """Sums exponentials along each row, and finds the largest magnitudes and elements."""

    def __init__(self, work: Work, lines: Lines, shifts: Array) -> None:
        super().__init__(work, lines, RowTables(shifts, shifts, shifts[0]), 0.0)

    def _run(self, state: CompiledState, first: int, count: int, data: Any) -> None:
        rows, line = self._rows_in(first, count), first // self._length
        sums, tops = np.empty((rows, 2, 2)), np.full((2, 2, rows), -np.inf)
        add_exponentials(data, first, count, state.scratch.buffers, self._known, state.own, sums, tops)
        state.found.append((_accumulated(line, sums), (line, tops)))

    def _found(self, state: CompiledState) -> RowSums:
        return RowSums(accumulate([sums for sums, _ in state.found]), [extremes for _, extremes in state.found])


class Divergences(_Rows):
    """Sums p ln(p/q) along each row."""

    def _run(self, state: CompiledState, first: int, count: int, data: Any) -> None:
        sums = np.empty((self._rows_in(first, count), 1, 2))
        add_divergences(data, first, count, state.scratch.buffers, self._known, state.own, sums)
        state.found.append(_accumulated(first // self._length, sums))

    def _found(self, state: CompiledState) -> Accumulated:
        return accumulate(state.found)
