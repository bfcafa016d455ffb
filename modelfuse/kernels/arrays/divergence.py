"""Passes along rows for divergences; always computed with numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelfuse.kernels import CPU_BLOCK, CPU_WORKER_BYTES, Bytes, Work
from modelfuse.kernels.arrays.blocks import ArrayState, Walk
from modelfuse.kernels.arrays.library import Array, Tensor
from modelfuse.kernels.arrays.numpy import NumpyLibrary
from modelfuse.kernels.divergence import RowSums, RowTables
from modelfuse.kernels.elementary import NEAR, exp, exp_near_zero, log, log_near_one
from modelfuse.kernels.lines import Accumulated, Lines, accumulate, add_exactly


class _Rows(Walk):
    """A pass over rows of the model and of the base, decoded to float64."""

    #: Both sources' elements, and temporaries of exponentials and logarithms.
    scratch = 200

    def __init__(self, work: Work, lines: Lines) -> None:
        super().__init__(work, NumpyLibrary(CPU_WORKER_BYTES, CPU_BLOCK))
        self._lines = lines

    def start(self) -> ArrayState:
        return self._state([])

    def block(self, state: ArrayState, first: int, xs: list[Tensor], base: Tensor | None, out: Bytes) -> None:
        wide = [np.zeros(xs[0].size) if base is None else base.astype(np.float64)]
        wide.insert(0, xs[0].astype(np.float64) + wide[0])
        for part in self._lines.parts(first, xs[0].size):
            here = slice(part.start - first, part.stop - first)
            rows = -1 if part.whole else 1
            groups = [each[here].reshape(rows, self._lines.length if part.whole else part.stop - part.start)
                      for each in wide]  # fmt: skip
            state.found.append(self._found(part.start // self._lines.group, np.stack(groups)))

    def _found(self, line: int, rows: Array) -> Any:
        """The finding of consecutive lines, or of a piece of one; ``rows``: float64, shape (2, lines, elements)."""
        raise NotImplementedError

    def finish(self, state: ArrayState) -> Any:
        return state.found


class Exponentials(_Rows):
    """Sums exponentials along each row, and finds the largest magnitudes and elements."""

    def __init__(self, work: Work, lines: Lines, shifts: Array) -> None:
        super().__init__(work, lines)
        self._shifts = shifts

    def _found(self, line: int, rows: Array) -> tuple[Accumulated, tuple[int, Array]]:
        extremes = np.stack([np.abs(rows).max(axis=2), rows.max(axis=2)])
        powers = _powers(rows, self._shifts[:, line : line + rows.shape[1], None])
        return _added(line, powers), (line, extremes)

    def finish(self, state: ArrayState) -> RowSums:
        return RowSums(accumulate([sums for sums, _ in state.found]), [extremes for _, extremes in state.found])


class Divergences(_Rows):
    """Sums p ln(p/q) along each row."""

    def __init__(self, work: Work, lines: Lines, tables: RowTables, least: float) -> None:
        super().__init__(work, lines)
        self._tables, self._least = tables, least

    def _found(self, line: int, rows: Array) -> Accumulated:
        here, least = slice(line, line + rows.shape[1]), self._least
        shifts, scales = (each[:, here, None] for each in (self._tables.shifts, self._tables.scales))
        p, q = _powers(rows, shifts) * scales
        excess = least * (q - p) / (p * (q + least))
        near = np.abs(excess) < NEAR
        change = (rows[0] - rows[1]) - self._tables.change[here, None]
        logarithms = np.where(near, change + log_near_one(excess), np.nan)
        if not near.all():
            logarithms[~near] = log((p[~near] + least) / (q[~near] + least))
        return _added(line, ((p + least) * logarithms)[None])

    def finish(self, state: ArrayState) -> Accumulated:
        return accumulate(state.found)


def _powers(rows: Array, shifts: Array) -> Array:
    """Exponentials; the model's are the base's times that of a small difference, where it is one."""
    theirs, change = exp(rows[1] - shifts[1]), rows[0] - rows[1]
    near = (np.abs(change) < NEAR) & (shifts[0] == 0.0) & (shifts[1] == 0.0)
    ours = theirs * exp_near_zero(change)
    if not near.all():
        ours[~near] = exp((rows[0] - shifts[0])[~near])
    return np.stack([ours, theirs])


def _added(line: int, values: Array) -> Accumulated:
    """Pairwise sums along the last axis."""
    lost = np.zeros_like(values)
    while (width := values.shape[-1]) > 1:
        if width % 2:
            pad = [(0, 0)] * (values.ndim - 1) + [(0, 1)]
            values, lost = np.pad(values, pad), np.pad(lost, pad)
        half = values.shape[-1] // 2
        values, error = add_exactly(values[..., :half], values[..., half:])
        lost = lost[..., :half] + lost[..., half:] + error
    return Accumulated(line, values, lost)
