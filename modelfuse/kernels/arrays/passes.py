"""Merging one tensor with a tensor library: which passes, and what each one learns."""

from __future__ import annotations

import numpy as np

from modelfuse.kernels import Bytes, Procedure, Work
from modelfuse.kernels.arrays.blocks import State, Walk
from modelfuse.kernels.arrays.histograms import measure_sparsifier
from modelfuse.kernels.arrays.library import Array, Library, Tensor
from modelfuse.kernels.arrays.methods import Sparsifier
from modelfuse.methods.arrays import total
from modelfuse.methods.slerp import coefficients


def merge_procedure(work: Work, library: Library) -> Procedure:
    """The passes that merge one tensor on the library's device."""
    sparsifier = yield from measure_sparsifier(work, library)
    method, weights = work.method, work.method.weights
    if method.merge_type == "slerp":
        sums = np.concatenate((yield DotProducts(work, library, sparsifier)), axis=1)
        weights = coefficients(
            total(sums[0]), total(sums[1]), total(sums[2]), method.slerp_alpha, method.slerp_normalize_eps,
            method.slerp_dot_threshold,
        )  # fmt: skip
    yield Combine(work, library, sparsifier, weights)


class _Sparsified(Walk):
    """A pass over what a sparsifier leaves."""

    def __init__(self, work: Work, library: Library, sparsifier: Sparsifier) -> None:
        super().__init__(work, library)
        self._how = sparsifier
        self.fixed = 8 * (sum(table.size for table in sparsifier.tables) + sparsifier.subtables.size)

    def start(self) -> State:
        how, library = self._how, self._library
        with library.working():
            tables = [library.place(table.astype(how.compute)) for table in how.tables]
            return self._state([], (tables, library.place(how.subtables.astype(how.compute).ravel())))

    def _sparsify(self, state: State, first: int, xs: list[Tensor]) -> None:
        """Sparsify all models in place."""
        how, arithmetic = self._how, self._arithmetic
        if how.kind in (None, "trim"):
            for model, (threshold, factor) in enumerate(how.numbers if how.kind else ()):
                xs[model] = arithmetic.trim(xs[model], threshold, factor)
            return
        count = xs[0].shape[0]
        counters = arithmetic.counters(first, count)
        tables, subtables = state.placed
        for model, (probability, active) in enumerate(how.numbers):
            if not active:
                continue
            draws = arithmetic.draws(counters, how.keys[model], count)
            if how.kind == "dare":
                xs[model] = arithmetic.dare(xs[model], draws, probability, how.rescale)
            else:
                keep = arithmetic.keep_probabilities(xs[model], how, tables[model], subtables)
                xs[model] = arithmetic.magprune(xs[model], draws, keep, how.rescale)


class Combine(_Sparsified):
    """The pass that merges and writes."""

    writes = True
    scratch = 80

    def __init__(self, work: Work, library: Library, sparsifier: Sparsifier, weights: tuple[float, ...]) -> None:
        super().__init__(work, library, sparsifier)
        self._weights = weights

    def block(self, state: State, first: int, xs: list[Tensor], base: Tensor | None, out: Bytes) -> None:
        method, arithmetic = self._work.method, self._arithmetic
        self._sparsify(state, first, xs)
        if method.merge_type == "ties":
            result = arithmetic.ties(xs, self._weights, method.ties_elect_type == "count", method.normalize)
        else:
            result = arithmetic.linear(xs, self._weights)
        stored = arithmetic.encode(result if base is None else result + base, self._work.out)
        state.counts.append(arithmetic.count_bad(stored))
        self._library.store(stored, out)

    def finish(self, state: State) -> None:
        return None


class DotProducts(_Sparsified):
    """The pass that measures slerp's norms and dot product; finds float64 sums, shape (3, numbers to add up)."""

    scratch = 80

    def block(self, state: State, first: int, xs: list[Tensor], base: Tensor | None, out: Bytes) -> None:
        self._sparsify(state, first, xs)
        state.found.append(self._library.fetch(self._arithmetic.dot_products(*xs)).reshape(3, -1))

    def finish(self, state: State) -> Array:
        return np.concatenate(state.found, axis=1)
