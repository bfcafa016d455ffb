"""Passes that apply the element step, and passes over the combination's result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from modelfuse.kernels import Bytes, PassStep, Work
from modelfuse.kernels.arrays.arithmetic import DeviceKeepTables
from modelfuse.kernels.arrays.blocks import ArrayState, Walk
from modelfuse.kernels.arrays.evaluate import Evaluator
from modelfuse.kernels.arrays.library import Array, Library, Tensor
from modelfuse.kernels.arrays.numpy import NumpyLibrary
from modelfuse.kernels.element import Element
from modelfuse.kernels.lines import Fragment, Lines
from modelfuse.kernels.order_statistics import BINS, FLOAT_ENCODINGS
from modelfuse.kernels.procedures import Coefficients
from modelfuse.methods.expressions import Expression


class Host(Walk):
    """A pass over whole slices in host memory, with numpy whatever the library is."""

    def __init__(self, work: Work) -> None:
        super().__init__(work, NumpyLibrary(0, 0))

    def apply(self, state: ArrayState, first: int, count: int, raws: Bytes, out: Bytes) -> None:
        with self._library.working():
            xs = self._load(state, raws, 0, count)
            base = xs.pop() if self._work.has_base else None
            self.block(state, first, xs, base, out)
            self._add_counts(state)

    def values(self, raws: Bytes, count: int) -> tuple[list[Array], Array | None]:
        """The models' differences to the base (or elements) of a slice, and the base's elements."""
        with self._library.working():
            xs = self._load(self._state(), raws, 0, count)
            return xs, xs.pop() if self._work.has_base else None


class Fragments(Host):
    """The pass that collects the magnitudes of groups of lines that slices cut."""

    def __init__(self, work: Work, lines: Lines) -> None:
        super().__init__(work)
        self._lines = lines

    def start(self) -> ArrayState:
        return self._state([])

    def steps(self, state: ArrayState, first: int, count: int, most: int) -> Iterator[PassStep]:
        """Only what slices cut is read."""
        for start in range(first, first + count, most):
            for part in self._lines.parts(start, min(most, first + count - start)):
                if not part.whole:
                    yield PassStep(part.start, part.stop - part.start)

    def block(self, state: ArrayState, first: int, xs: list[Tensor], base: Tensor | None, out: Bytes) -> None:
        for start, stop, whole in self._lines.parts(first, xs[0].size):
            if not whole:
                state.found.append((start, np.stack([np.abs(x[start - first : stop - first]) for x in xs])))

    def finish(self, state: ArrayState) -> list[Fragment]:
        found: list[Fragment] = state.found
        return found


class Chained(Walk):
    """A pass over elements after the element step."""

    scratch = 80

    def __init__(self, work: Work, library: Library, element: Element) -> None:
        super().__init__(work, library)
        self._element = element
        self._host = Host(work) if element.lines is not None else None
        self.fixed = 8 * (BINS * len(element.keep.tables) + element.keep.subtables.size)

    def start(self) -> ArrayState:
        with self._library.working():
            return self._state([], self._tables_on_device())

    def apply(self, state: ArrayState, first: int, count: int, raws: Bytes, out: Bytes) -> None:
        if self._host is not None and self._element.lines is not None:
            # Ranks within lines need whole lines, of which a block may have only a part.
            magnitudes = np.abs(np.stack(self._host.values(raws, count)[0]))
            state.keep, state.first = self._element.lines.of(first, magnitudes), first
        super().apply(state, first, count, raws, out)

    def _tables_on_device(self) -> DeviceKeepTables:
        library, compute, keep = self._library, self._work.compute, self._element.keep
        tables = []
        for bins, keeps in keep.tables:
            table = np.ones(BINS)
            table[bins] = keeps
            tables.append(library.to_device(table.astype(compute)))
        subtables = library.to_device(keep.subtables.astype(compute).ravel())
        return DeviceKeepTables(FLOAT_ENCODINGS[compute].shift, tables, subtables, keep.levels)

    def _elements(
        self, state: ArrayState, first: int, xs: list[Tensor], model: int, counters: Tensor | None
    ) -> Evaluator:
        """The evaluator for expressions of one model's elements."""
        chain, arithmetic, count = self._work.method.chain, self._arithmetic, xs[model].shape[0]
        arrays: dict[str, list[Tensor]] = {"x": xs}
        if counters is not None:
            arrays["draw"] = [arithmetic.draws(counters, self._element.keys[model], count)] * len(xs)
        if chain.keeps and state.keep is not None:
            keep = np.ascontiguousarray(state.keep[model, first - state.first :][:count])
            arrays["keep"] = [self._library.to_device(keep)] * len(xs)
        elif chain.keeps and self._element.keep.exact is not None:
            exact = self._element.keep.exact[model, first : first + count].astype(self._work.compute)
            arrays["keep"] = [self._library.to_device(exact)] * len(xs)
        elif chain.keeps:
            arrays["keep"] = [arithmetic.keep_probabilities(xs[model], state.placed, model)] * len(xs)
        return Evaluator(self._library, arithmetic, arrays, self._element.numbers, {})

    def _counters(self, first: int, count: int) -> Tensor | None:
        return self._arithmetic.counters(first, count) if self._work.method.chain.draws else None

    def _apply_element(self, state: ArrayState, first: int, xs: list[Tensor]) -> None:
        """Apply the element step to all models, in place."""
        chain = self._work.method.chain
        if chain.element is None:
            return
        counters = self._counters(first, xs[0].shape[0])
        for model in range(len(xs)):
            xs[model] = self._elements(state, first, xs, model, counters).of_model(chain.element, model)

    def _merged(self, first: int, xs: list[Tensor], base: Tensor | None, numbers: Coefficients) -> Evaluator:
        """The evaluator for expressions of all models' elements, after the element step."""
        arrays: dict[str, Any] = {"x": xs, "base": base}
        for name, (lines, table) in numbers.lined.items():
            own = lines.numbers(first, xs[0].shape[0])
            rows = [self._library.to_device(row[own].astype(self._work.compute)) for row in table]
            arrays[name] = rows if len(rows) == len(xs) else rows * len(xs)
        return Evaluator(self._library, self._arithmetic, arrays, numbers.each, numbers.shared)


class Added(Chained):
    """A pass that sums terms; finds float64 partial sums, shape (models · terms, partial sums)."""

    def __init__(self, work: Work, library: Library, element: Element, terms: Sequence[Expression]) -> None:
        super().__init__(work, library, element)
        self._terms = terms

    def _add(self, state: ArrayState, found: list[Tensor]) -> None:
        sums = self._library.fetch(self._arithmetic.sums(found))
        state.found.append(sums.reshape(sums.shape[0], -1))

    def finish(self, state: ArrayState) -> Array:
        return np.concatenate(state.found, axis=1)
