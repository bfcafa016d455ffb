"""Kullback-Leibler divergences of a model's rows from the base's; always computed with numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelfuse.kernels import CPU_BLOCK, CPU_WORKER_BYTES, Bytes, Work
from modelfuse.kernels.arrays.blocks import ArrayState, Walk
from modelfuse.kernels.arrays.library import Array, Tensor
from modelfuse.kernels.arrays.numpy import NumpyLibrary
from modelfuse.kernels.elementary import exp, log
from modelfuse.kernels.lines import Accumulated, Lines, accumulate, add_exactly, line_sums
from modelfuse.kernels.measures import Passes


def divergence(work: Work, lines: Lines, least: float) -> Passes:
    """Σ p ln(p/q) of each line, at least 0; p and q are the softmax of the model and of the base, plus ``least``."""
    largest = np.full((2, lines.number), -np.inf)
    for first, found in (each for span in (yield Largest(work, lines)) for each in span):
        here = largest[:, first : first + found.shape[1]]
        np.maximum(here, found, out=here)
    sums = line_sums((yield Exponentials(work, lines, largest)))
    return np.maximum(line_sums((yield Divergences(work, lines, largest, sums, least)))[0], 0.0)


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


class Largest(_Rows):
    """Finds the largest element of each line."""

    def _found(self, line: int, rows: Array) -> tuple[int, Array]:
        return line, rows.max(axis=2)


class Exponentials(_Rows):
    """Sums exp(x − largest) along each line."""

    def __init__(self, work: Work, lines: Lines, largest: Array) -> None:
        super().__init__(work, lines)
        self._largest = largest

    def _powers(self, line: int, rows: Array) -> Array:
        return exp(rows - self._largest[:, line : line + rows.shape[1], None])

    def _found(self, line: int, rows: Array) -> Accumulated:
        return _added(line, self._powers(line, rows))

    def finish(self, state: ArrayState) -> Accumulated:
        return accumulate(state.found)


class Divergences(Exponentials):
    """Sums p ln(p/q) along each line."""

    def __init__(self, work: Work, lines: Lines, largest: Array, sums: Array, least: float) -> None:
        super().__init__(work, lines, largest)
        self._sums, self._least = sums, least

    def _found(self, line: int, rows: Array) -> Accumulated:
        shares = self._powers(line, rows) / self._sums[:, line : line + rows.shape[1], None] + self._least
        return _added(line, (shares[0] * log(shares[0] / shares[1]))[None])


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
