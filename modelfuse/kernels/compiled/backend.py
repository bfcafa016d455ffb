"""The compiled backend; passes without a compiled loop use numpy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from modelfuse.kernels import Pass, Procedure, Work
from modelfuse.kernels.compiled.divergence import Divergences, Exponentials
from modelfuse.kernels.compiled.passes import (
    Combine,
    DotProducts,
    ElementSums,
    Gather,
    MadeElements,
    MergedSums,
)
from modelfuse.kernels.compiled.tally_passes import TallyAll, TallyWithin
from modelfuse.kernels.divergence import RowTables
from modelfuse.kernels.element import Element, Merged
from modelfuse.kernels.line_marks import can_mark
from modelfuse.kernels.lines import Lines
from modelfuse.kernels.measures import FragmentsPass, SumsPass, TallyPass
from modelfuse.kernels.procedures import Backend, Coefficients, LinePass, ProductsPass
from modelfuse.kernels.procedures import merge_procedure as procedure_over
from modelfuse.methods.expressions import Expression

Array = np.ndarray[Any, Any]


class CompiledBackend:
    """The backend whose passes are compiled loops over stored bytes."""

    def algebra(self) -> None:
        return None

    def gather(self, work: Work) -> Gather:
        return Gather(work)

    def all(self, work: Work, merged: Merged | None = None) -> TallyPass:
        if merged is not None and _by_arrays(work, merged.element, merged.numbers):
            return self._arrays.all(work, merged)
        return TallyAll(work, merged)

    def within(
        self,
        work: Work,
        prefixes: list[Array],
        parent_shift: int,
        shift: int,
        digit_bits: int,
        merged: Merged | None = None,
    ) -> TallyPass:
        if merged is not None and _by_arrays(work, merged.element, merged.numbers):
            return self._arrays.within(work, prefixes, parent_shift, shift, digit_bits, merged)
        return TallyWithin(work, prefixes, (parent_shift, shift), digit_bits, merged)

    def element_sums(self, work: Work, element: Element, terms: Sequence[Expression]) -> SumsPass:
        if _lacks_ranks(work, element):
            return self._arrays.element_sums(work, element, terms)
        return ElementSums(work, element)

    def fragments(self, work: Work, lines: Lines) -> FragmentsPass:
        return self._arrays.fragments(work, lines)

    def products(self, work: Work, element: Element) -> ProductsPass:
        if _lacks_ranks(work, element):
            return self._arrays.products(work, element)
        return DotProducts(work, element)

    def line_products(self, work: Work, element: Element, lines: Lines) -> LinePass:
        return self._arrays.line_products(work, element, lines)

    def merged_sums(self, work: Work, element: Element, numbers: Coefficients, terms: Sequence[Expression]) -> SumsPass:
        if _by_arrays(work, element, numbers):
            return self._arrays.merged_sums(work, element, numbers, terms)
        return MergedSums(work, element, MadeElements.of(work, numbers, terms))

    def exponentials(self, work: Work, lines: Lines, shifts: Array) -> Exponentials:
        return Exponentials(work, lines, shifts)

    def divergences(self, work: Work, lines: Lines, tables: RowTables, least: float) -> Divergences:
        return Divergences(work, lines, tables, least)

    def combine(self, work: Work, element: Element, numbers: Coefficients) -> Pass:
        if _by_arrays(work, element, numbers):
            return self._arrays.combine(work, element, numbers)
        return Combine(work, element, numbers)

    @cached_property
    def _arrays(self) -> Backend:
        """The numpy backend, for passes without a compiled loop: those along lines."""
        from modelfuse.kernels import CPU_BLOCK, CPU_WORKER_BYTES
        from modelfuse.kernels.arrays.numpy import NumpyLibrary
        from modelfuse.kernels.arrays.passes import ArrayBackend

        return ArrayBackend(NumpyLibrary(CPU_WORKER_BYTES, CPU_BLOCK))


def _by_arrays(work: Work, element: Element, numbers: Coefficients) -> bool:
    """Whether loops lack a number: the ranks within some lines, or numbers of lines along several axes."""
    return _lacks_ranks(work, element) or len({lines for lines, _ in numbers.lined.values()}) > 1


def _lacks_ranks(work: Work, element: Element) -> bool:
    """Whether ranks within lines are needed that compiled loops do not find."""
    return element.lines is not None and not can_mark(work.method.chain, element.lines.lines)


def merge_procedure(work: Work) -> Procedure:
    """The procedure that merges one tensor with compiled loops."""
    return procedure_over(work, CompiledBackend())
