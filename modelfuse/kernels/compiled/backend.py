"""The compiled backend; passes without a compiled loop use numpy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from modelfuse.kernels import Pass, Procedure, Work
from modelfuse.kernels.compiled.passes import Combine, DotProducts, ElementSums, Gather, TallyAll, TallyWithin
from modelfuse.kernels.lines import Lines
from modelfuse.kernels.measures import Element, FragmentsPass, Merged, Passes, SumsPass, TallyPass
from modelfuse.kernels.order_statistics import FLOAT_ENCODINGS
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
        if merged is not None:
            return self._arrays.all(work, merged)
        return TallyAll(work, FLOAT_ENCODINGS[work.compute])

    def within(
        self,
        work: Work,
        prefixes: list[Array],
        parent_shift: int,
        shift: int,
        digit_bits: int,
        merged: Merged | None = None,
    ) -> TallyPass:
        if merged is not None:
            return self._arrays.within(work, prefixes, parent_shift, shift, digit_bits, merged)
        return TallyWithin(work, prefixes, (FLOAT_ENCODINGS[work.compute].shift, parent_shift, shift), digit_bits)

    def element_sums(self, work: Work, element: Element, terms: Sequence[Expression]) -> SumsPass:
        if element.lines is not None:
            return self._arrays.element_sums(work, element, terms)
        return ElementSums(work, element)

    def fragments(self, work: Work, lines: Lines) -> FragmentsPass:
        return self._arrays.fragments(work, lines)

    def products(self, work: Work, element: Element) -> ProductsPass:
        return DotProducts(work, element)

    def line_products(self, work: Work, element: Element, lines: Lines) -> LinePass:
        return self._arrays.line_products(work, element, lines)

    def merged_sums(self, work: Work, element: Element, numbers: Coefficients, terms: Sequence[Expression]) -> SumsPass:
        return self._arrays.merged_sums(work, element, numbers, terms)

    def divergence(self, work: Work, lines: Lines, least: float) -> Passes:
        return self._arrays.divergence(work, lines, least)

    def combine(self, work: Work, element: Element, numbers: Coefficients) -> Pass:
        if element.lines is not None or numbers.lined:
            return self._arrays.combine(work, element, numbers)
        return Combine(work, element, numbers)

    @cached_property
    def _arrays(self) -> Backend:
        """The numpy backend, for passes without a compiled loop: lines, and expressions of all models."""
        from modelfuse.kernels import CPU_BLOCK, CPU_WORKER_BYTES
        from modelfuse.kernels.arrays.numpy import NumpyLibrary
        from modelfuse.kernels.arrays.passes import ArrayBackend

        return ArrayBackend(NumpyLibrary(CPU_WORKER_BYTES, CPU_BLOCK))


def merge_procedure(work: Work) -> Procedure:
    """The procedure that merges one tensor with compiled loops."""
    return procedure_over(work, CompiledBackend())
