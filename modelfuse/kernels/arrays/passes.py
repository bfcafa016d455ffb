"""The passes of the array backend: merging one tensor with a tensor library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from modelfuse.kernels import Bytes, Procedure, Work
from modelfuse.kernels.arrays.blocks import ArrayState
from modelfuse.kernels.arrays.chained import Added, Chained, Fragments
from modelfuse.kernels.arrays.divergence import Divergences, Exponentials
from modelfuse.kernels.arrays.histograms import Gather, TallyAll, TallyWithin
from modelfuse.kernels.arrays.library import Array, Library, Tensor
from modelfuse.kernels.arrays.line_products import LineProducts
from modelfuse.kernels.divergence import RowTables
from modelfuse.kernels.element import Element, Merged
from modelfuse.kernels.gram import gram_of
from modelfuse.kernels.lines import Lines
from modelfuse.kernels.procedures import Coefficients
from modelfuse.kernels.procedures import merge_procedure as procedure_over
from modelfuse.methods.arrays import total
from modelfuse.methods.expressions import Expression
from modelfuse.methods.spec import Algebra


class ArrayBackend:
    """The backend whose passes are operations of a tensor library."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def algebra(self) -> Algebra | None:
        return self._library.algebra()

    def gather(self, work: Work) -> Gather:
        return Gather(work, self._library)

    def all(self, work: Work, merged: Merged | None = None) -> TallyAll:
        return TallyAll(work, self._library, merged)

    def within(
        self,
        work: Work,
        prefixes: list[Array],
        parent_shift: int,
        shift: int,
        digit_bits: int,
        merged: Merged | None = None,
    ) -> TallyWithin:
        return TallyWithin(work, self._library, prefixes, (parent_shift, shift), digit_bits, merged)

    def element_sums(self, work: Work, element: Element, terms: Sequence[Expression]) -> ElementSums:
        return ElementSums(work, self._library, element, terms)

    def fragments(self, work: Work, lines: Lines) -> Fragments:
        return Fragments(work, lines)

    def products(self, work: Work, element: Element) -> DotProducts:
        return DotProducts(work, self._library, element)

    def line_products(self, work: Work, element: Element, lines: Lines) -> LineProducts:
        return LineProducts(work, self._library, element, lines)

    def merged_sums(
        self, work: Work, element: Element, numbers: Coefficients, terms: Sequence[Expression]
    ) -> MergedSums:
        return MergedSums(work, self._library, element, numbers, terms)

    def exponentials(self, work: Work, lines: Lines, shifts: Array) -> Exponentials:
        return Exponentials(work, lines, shifts)

    def divergences(self, work: Work, lines: Lines, tables: RowTables, least: float) -> Divergences:
        return Divergences(work, lines, tables, least)

    def combine(self, work: Work, element: Element, numbers: Coefficients) -> Combine:
        return Combine(work, self._library, element, numbers)


def merge_procedure(work: Work, library: Library) -> Procedure:
    """The procedure that merges one tensor on the library's device."""
    return procedure_over(work, ArrayBackend(library))


class Combine(Chained):
    """The pass that merges and writes."""

    writes = True

    def __init__(self, work: Work, library: Library, element: Element, numbers: Coefficients) -> None:
        super().__init__(work, library, element)
        self._numbers = numbers

    def block(self, state: ArrayState, first: int, xs: list[Tensor], base: Tensor | None, out: Bytes) -> None:
        arithmetic, numbers = self._arithmetic, self._numbers
        self._apply_element(state, first, xs)
        result = self._merged(first, xs, base, numbers).value(self._work.method.chain.combine)
        if numbers.factor != 1.0:
            result = result * arithmetic.number(numbers.factor)
        stored = arithmetic.encode(result if base is None else result + base, self._work.out)
        state.counts.append(arithmetic.count_bad(stored))
        self._library.store(stored, out)

    def finish(self, state: ArrayState) -> None:
        return None


class DotProducts(Chained):
    """The pass that measures dot products of models; finds float64 partial sums, shape (products, partial sums)."""

    def block(self, state: ArrayState, first: int, xs: list[Tensor], base: Tensor | None, out: Bytes) -> None:
        self._apply_element(state, first, xs)
        sums = self._library.fetch(self._arithmetic.dot_products(xs))
        state.found.append(sums.reshape(sums.shape[0], -1))

    def finish(self, state: ArrayState) -> Array:
        return np.concatenate(state.found, axis=1)

    def gram(self, found: list[Any]) -> Array:
        """The Gram matrix, float64, shape (models, models)."""
        return gram_of(self._work.models, list(np.concatenate(found, axis=1)))


class ElementSums(Added):
    """The pass that sums terms of each model's elements."""

    def block(self, state: ArrayState, first: int, xs: list[Tensor], base: Tensor | None, out: Bytes) -> None:
        counters, found = self._counters(first, xs[0].shape[0]), []
        for model in range(len(xs)):
            evaluation = self._elements(state, first, xs, model, counters)
            found += [evaluation.value(term, model) for term in self._terms]
        self._add(state, found)

    def sums(self, found: list[Any]) -> Array:
        """The sums, float64, shape (models, terms)."""
        sums = [total(each) for each in np.concatenate(found, axis=1)]
        return np.array(sums).reshape(self._work.models, len(self._terms))


class MergedSums(Added):
    """The pass that sums terms of all models' elements."""

    def __init__(
        self, work: Work, library: Library, element: Element, numbers: Coefficients, terms: Sequence[Expression]
    ) -> None:
        super().__init__(work, library, element, terms)
        self._numbers = numbers

    def block(self, state: ArrayState, first: int, xs: list[Tensor], base: Tensor | None, out: Bytes) -> None:
        self._apply_element(state, first, xs)
        evaluation = self._merged(first, xs, base, self._numbers)
        found = []
        for model in range(len(xs)):
            found += [evaluation.value(term, model) for term in self._terms if term.each or not model]
            evaluation.forget()
        self._add(state, found)

    def sums(self, found: list[Any]) -> Array:
        """The sums, float64, shape (models, terms); terms that are not per model are repeated for each."""
        sums = iter([total(each) for each in np.concatenate(found, axis=1)])
        table = np.empty((self._work.models, len(self._terms)))
        for model in range(self._work.models):
            for column, term in enumerate(self._terms):
                table[model, column] = next(sums) if term.each or not model else table[0, column]
        return table
