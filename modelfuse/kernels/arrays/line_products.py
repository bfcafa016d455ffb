"""Dot products of all pairs of models along the lines of a tensor."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelfuse.kernels import Bytes, Work
from modelfuse.kernels.arrays.blocks import ArrayState
from modelfuse.kernels.arrays.chained import Chained
from modelfuse.kernels.arrays.library import Array, Library, Tensor
from modelfuse.kernels.element import Element
from modelfuse.kernels.gram import pairs_of
from modelfuse.kernels.lines import Accumulated, GroupRun, Lines, accumulate, line_sums


class LineProducts(Chained):
    """The pass that measures them; finds the accumulated sums of each span's groups of lines."""

    def __init__(self, work: Work, library: Library, element: Element, lines: Lines) -> None:
        super().__init__(work, library, element)
        self._lines = lines

    def block(self, state: ArrayState, first: int, xs: list[Tensor], base: Tensor | None, out: Bytes) -> None:
        self._apply_element(state, first, xs)
        library, pairs = self._library, pairs_of(len(xs))
        wide = [library.cast(each, "float64") for each in xs]
        for part in self._lines.parts(first, xs[0].shape[0]):
            here = slice(part.start - first, part.stop - first)
            folded = [self._fold(wide[one][here] * wide[other][here], part) for one, other in pairs]
            sums, lost = (library.fetch(library.stack(*each)) for each in zip(*folded, strict=True))
            state.found.append(Accumulated(part.start // self._lines.group, sums, lost))

    def _fold(self, values: Tensor, part: GroupRun) -> tuple[Tensor, Tensor]:
        """Sums along lines and their rounding errors, shape (groups, lines per group)."""
        lines, arithmetic = self._lines, self._arithmetic
        if part.whole:
            return arithmetic.fold(values.reshape([-1, lines.length, lines.inner]))
        before, after = part.start % lines.inner, -part.stop % lines.inner
        if before:
            values = self._library.join(arithmetic.zeros(before), values)
        if after:
            values = self._library.join(values, arithmetic.zeros(after))
        return arithmetic.fold(values.reshape([1, -1, lines.inner]))

    def finish(self, state: ArrayState) -> Accumulated:
        return accumulate(state.found)

    def sums(self, found: list[Any]) -> Array:
        """The sums, float64, shape (pairs, lines)."""
        return np.asarray(line_sums(found))
