"""The passes of the compiled backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Struct

from modelfuse.kernels import Bytes, Extent, Work
from modelfuse.kernels.compiled import merge_loops
from modelfuse.kernels.compiled.dot_products import LANES
from modelfuse.kernels.compiled.generate import ChainKernels, MergedKernels, kernels_of, merged_kernels
from modelfuse.kernels.compiled.layout import laid_out_element, laid_out_numbers
from modelfuse.kernels.compiled.line_marker import LineMarker
from modelfuse.kernels.compiled.scratch import RAW_CODES, Scratch, give_back, inputs_of, lay_out, take_scratch
from modelfuse.kernels.compiled.source import names_of
from modelfuse.kernels.element import Element
from modelfuse.kernels.gram import gram_of, pairs_of
from modelfuse.kernels.procedures import Coefficients
from modelfuse.methods.arrays import total
from modelfuse.methods.expressions import Expression

Array = np.ndarray[Any, Any]


def chain_kernels(work: Work) -> ChainKernels:
    """The kernels of a tensor's method."""
    return kernels_of(work.method.chain)


class CompiledState(Struct):
    """The state of a span.

    Attributes:
        scratch: The worker's scratch.
        bad: Counts of non-finite elements.
        found: The finding so far.
        own: Further buffers of a pass, laid out.
    """

    scratch: Scratch
    bad: Array
    found: Any = None
    own: Any = None


class Walk:
    """Base class of passes: lays out slices for the kernels."""

    writes = False
    #: The laid-out parameters of the element step, if it is applied.
    _how: Any = None
    #: Marks what is kept by ranks within lines, if anything is.
    _marker: LineMarker | None = None

    def __init__(self, work: Work) -> None:
        self._work, self._inputs = work, inputs_of(work)

    def _prepare(self, element: Element, names: Sequence[str]) -> None:
        """Lay out the parameters of the element step, with the numbers of these names."""
        self._how = laid_out_element(self._work, element, names)
        if element.lines is not None:
            self._marker = LineMarker(self._work, element.keys, element.lines)

    def start(self) -> CompiledState:
        scratch = take_scratch(self._work, self._rows)
        if self._how is not None and self._work.method.chain.looks_up:
            merge_loops.spread(self._how, scratch.buffers)
        return CompiledState(scratch, scratch.bad)

    @property
    def _rows(self) -> int:
        """The rows of results that the kernel needs."""
        return chain_kernels(self._work).rows_for(self._work.models)

    def finish(self, state: CompiledState) -> Any:
        found = self._found(state)
        state.bad = state.bad.copy()
        give_back(state.scratch)
        return found

    def _found(self, state: CompiledState) -> Any:
        return state.found

    def read_from(self, state: CompiledState, extents: Sequence[Extent]) -> bool:
        state.scratch.files.read_from(extents, self._work.sources)
        return True

    def apply(self, state: CompiledState, first: int, count: int, raws: Bytes, out: Bytes) -> None:
        data = lay_out(self._inputs, raws, out)
        with state.scratch.files.at(first):
            if self._marker is None:
                self._run(state, first, count, data)
                return
            with self._marker.marked(state.scratch, first, count, data):
                self._run(state, first, count, data)

    def _run(self, state: CompiledState, first: int, count: int, data: Any) -> None:
        """Call the kernel on a slice."""
        raise NotImplementedError


class Chained(Walk):
    """A pass over elements after the element step."""

    def __init__(self, work: Work, element: Element, names: Sequence[str] | None = None) -> None:
        super().__init__(work)
        self._prepare(element, work.method.chain.element_numbers if names is None else names)


class Combine(Chained):
    """The pass that merges and writes."""

    writes = True

    def __init__(self, work: Work, element: Element, numbers: Coefficients) -> None:
        super().__init__(work, element)
        self._numbers = laid_out_numbers(work, numbers, chain_kernels(work).combination)
        self._out_code = RAW_CODES[work.out.name]

    def _run(self, state: CompiledState, first: int, count: int, data: Any) -> None:
        combine = chain_kernels(self._work).combine
        combine(data, first, count, state.scratch.buffers, self._how, self._numbers, self._out_code)


class DotProducts(Chained):
    """The pass that measures the dot products of all pairs of models.

    Finds float64 sums and their rounding errors, a row for every CHUNK elements: shape (chunks, 2 · products).
    """

    def __init__(self, work: Work, element: Element) -> None:
        super().__init__(work, element)
        self._products = len(pairs_of(work.models))

    def start(self) -> CompiledState:
        state = super().start()
        state.found = []
        return state

    def _run(self, state: CompiledState, first: int, count: int, data: Any) -> None:
        sums = np.empty((math.ceil(count / merge_loops.CHUNK), 2 * self._products))
        lanes = np.empty((2 * self._products, LANES))
        chain_kernels(self._work).multiply(data, first, count, state.scratch.buffers, self._how, lanes, sums)
        state.found.append(sums)

    def _found(self, state: CompiledState) -> Array:
        return np.concatenate(state.found)

    def gram(self, found: list[Any]) -> Array:
        """The Gram matrix, float64, shape (models, models)."""
        sums = np.concatenate(found)
        products = range(self._products)
        return gram_of(self._work.models, [sums[:, [each, each + self._products]] for each in products])


class Gather(Walk):
    """The pass that finds the bits of all magnitudes, uint64, shape (models, elements)."""

    def _run(self, state: CompiledState, first: int, count: int, data: Any) -> None:
        state.found = np.empty((self._work.models, count), np.uint64)
        merge_loops.gather(data, count, state.scratch.buffers, state.found)


class Added(Chained):
    """A pass that sums terms.

    Finds, for each slice: its first element; float64 sums and their rounding errors, a row for every CHUNK elements:
    shape (chunks, models · terms, 2); and its marks, if there are any.

    Args:
        work: The tensor.
        element: The parameters of the element step.
        names: The names of the numbers that the kernel takes of each model.
        models: How many models have sums of their own.
        terms: The number of terms.
    """

    def __init__(self, work: Work, element: Element, names: Sequence[str] | None, models: int, terms: int) -> None:
        super().__init__(work, element, names)
        self._models, self._terms = models, terms

    def start(self) -> CompiledState:
        state = super().start()
        state.found = []
        return state

    def _run(self, state: CompiledState, first: int, count: int, data: Any) -> None:
        rows = self._models * self._terms
        sums, lanes = np.empty((math.ceil(count / merge_loops.CHUNK), rows, 2)), np.empty((rows, 2, LANES))
        self._add(state, first, count, data, lanes, sums)
        state.found.append((first, sums, None if self._marker is None else self._marker.packed(state.scratch, count)))

    def _add(self, state: CompiledState, first: int, count: int, data: Any, lanes: Array, sums: Array) -> None:
        """Call the kernel on a slice."""
        raise NotImplementedError

    def sums(self, found: list[Any]) -> Array:
        """The sums, float64, shape (models, terms); those that models share are repeated."""
        slices = [each for span in found for each in span]
        if self._marker is not None:
            self._marker.remember({first: marks for first, _, marks in slices})
        parts = np.concatenate([each for _, each, _ in slices])
        sums = np.array([total(parts[:, row]) for row in range(parts.shape[1])]).reshape(self._models, self._terms)
        return np.broadcast_to(sums, (self._work.models, self._terms))


class ElementSums(Added):
    """The pass that sums terms of each model's elements, before the element step."""

    def __init__(self, work: Work, element: Element) -> None:
        terms = work.method.chain.terms
        super().__init__(work, element, names_of(terms, each=True), work.models, len(terms))

    def _add(self, state: CompiledState, first: int, count: int, data: Any, lanes: Array, sums: Array) -> None:
        add_up = chain_kernels(self._work).add_up
        add_up(data, first, count, state.scratch.buffers, self._how, self._terms, lanes, sums)


class MadeElements(Struct, frozen=True):
    """What is made of all models' elements, after the element step.

    Attributes:
        expressions: How it is made.
        numbers: The laid-out numbers in these expressions.
        models: How many models have values of their own; 1 if all share them.
    """

    expressions: tuple[Expression, ...]
    numbers: Any
    models: int

    @classmethod
    def of(cls, work: Work, numbers: Coefficients, expressions: Sequence[Expression]) -> MadeElements:
        """Lay out the numbers."""
        own = tuple(expressions)
        laid = laid_out_numbers(work, numbers, merged_kernels(work.method.chain, own).combination)
        return cls(own, laid, work.models if any(each.each for each in own) else 1)

    def kernels(self, work: Work) -> MergedKernels:
        """The kernels that measure it."""
        return merged_kernels(work.method.chain, self.expressions)


class MergedSums(Added):
    """The pass that sums terms of all models' elements."""

    def __init__(self, work: Work, element: Element, made: MadeElements) -> None:
        super().__init__(work, element, None, made.models, len(made.expressions))
        self._made = made

    @property
    def _rows(self) -> int:
        return self._made.kernels(self._work).combination.rows_for(self._work.models)

    def _add(self, state: CompiledState, first: int, count: int, data: Any, lanes: Array, sums: Array) -> None:
        made, buffers = self._made, state.scratch.buffers
        add_up = made.kernels(self._work).add_up
        add_up(data, first, count, buffers, self._how, made.numbers, made.models, self._terms, lanes, sums)
