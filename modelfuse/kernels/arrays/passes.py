"""Merging one tensor with a tensor library: its passes, and what each one finds."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelfuse.kernels import Bytes, Procedure, Work
from modelfuse.kernels.arrays.arithmetic import Tables
from modelfuse.kernels.arrays.blocks import State, Walk
from modelfuse.kernels.arrays.evaluate import Evaluation
from modelfuse.kernels.arrays.histograms import Gather, TallyAll, TallyWithin
from modelfuse.kernels.arrays.library import Array, Library, Tensor
from modelfuse.kernels.gram import gram_of
from modelfuse.kernels.measures import Element
from modelfuse.kernels.order_statistics import BINS, LAYOUTS
from modelfuse.kernels.procedures import Coefficients
from modelfuse.kernels.procedures import merge_procedure as procedure_over


class ArrayBackend:
    """The passes that are operations of a tensor library."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def gather(self, work: Work) -> Gather:
        return Gather(work, self._library)

    def all(self, work: Work) -> TallyAll:
        return TallyAll(work, self._library)

    def within(self, work: Work, prefixes: list[Array], parent_shift: int, shift: int, digit_bits: int) -> TallyWithin:
        return TallyWithin(work, self._library, prefixes, parent_shift, shift, digit_bits)

    def products(self, work: Work, element: Element) -> DotProducts:
        return DotProducts(work, self._library, element)

    def combine(self, work: Work, element: Element, numbers: Coefficients) -> Combine:
        return Combine(work, self._library, element, numbers)


def merge_procedure(work: Work, library: Library) -> Procedure:
    """The passes that merge one tensor on the library's device."""
    return procedure_over(work, ArrayBackend(library))


class _Chained(Walk):
    """A pass over what the element step leaves."""

    scratch = 80

    def __init__(self, work: Work, library: Library, element: Element) -> None:
        super().__init__(work, library)
        self._element = element
        self.fixed = 8 * (BINS * len(element.keep.tables) + element.keep.subtables.size)

    def start(self) -> State:
        with self._library.working():
            return self._state([], self._place_tables())

    def _place_tables(self) -> Tables:
        library, compute, keep = self._library, self._work.compute, self._element.keep
        tables = []
        for bins, keeps in keep.tables:
            table = np.ones(BINS)
            table[bins] = keeps
            tables.append(library.place(table.astype(compute)))
        subtables = library.place(keep.subtables.astype(compute).ravel())
        return Tables(LAYOUTS[compute].shift, tables, subtables, keep.levels)

    def _apply_element(self, state: State, first: int, xs: list[Tensor]) -> None:
        """Apply the element step to all models, in place."""
        chain, arithmetic = self._work.method.chain, self._arithmetic
        if chain.element is None:
            return
        count = xs[0].shape[0]
        counters = arithmetic.counters(first, count) if chain.draws else None
        for model in range(len(xs)):
            arrays: dict[str, list[Tensor]] = {"x": xs}
            if chain.draws:
                arrays["draw"] = [arithmetic.draws(counters, self._element.keys[model], count)] * len(xs)
            if chain.keeps:
                arrays["keep"] = [self._keep(state, first, xs[model], model)] * len(xs)
            evaluation = Evaluation(self._library, arithmetic, arrays, self._element.numbers, {})
            xs[model] = evaluation.of_model(chain.element, model)

    def _keep(self, state: State, first: int, x: Tensor, model: int) -> Tensor:
        exact = self._element.keep.exact
        if exact is None:
            return self._arithmetic.keep_probabilities(x, state.placed, model)
        return self._library.place(exact[model, first : first + x.shape[0]].astype(self._work.compute))


class Combine(_Chained):
    """The pass that merges and writes."""

    writes = True

    def __init__(self, work: Work, library: Library, element: Element, numbers: Coefficients) -> None:
        super().__init__(work, library, element)
        self._numbers = numbers

    def block(self, state: State, first: int, xs: list[Tensor], base: Tensor | None, out: Bytes) -> None:
        arithmetic, numbers = self._arithmetic, self._numbers
        self._apply_element(state, first, xs)
        arrays = {"x": xs, "base": base}
        evaluation = Evaluation(self._library, arithmetic, arrays, numbers.each, numbers.shared)
        result = evaluation.value(self._work.method.chain.combine)
        if numbers.factor != 1.0:
            result = result * arithmetic.number(numbers.factor)
        stored = arithmetic.encode(result if base is None else result + base, self._work.out)
        state.counts.append(arithmetic.count_bad(stored))
        self._library.store(stored, out)

    def finish(self, state: State) -> None:
        return None


class DotProducts(_Chained):
    """The pass that measures dot products of models; finds float64 sums, shape (products, numbers to add up)."""

    def block(self, state: State, first: int, xs: list[Tensor], base: Tensor | None, out: Bytes) -> None:
        self._apply_element(state, first, xs)
        sums = self._library.fetch(self._arithmetic.dot_products(xs))
        state.found.append(sums.reshape(sums.shape[0], -1))

    def finish(self, state: State) -> Array:
        return np.concatenate(state.found, axis=1)

    def gram(self, found: list[Any]) -> Array:
        """The Gram matrix, float64, shape (models, models)."""
        return gram_of(self._work.models, list(np.concatenate(found, axis=1)))
