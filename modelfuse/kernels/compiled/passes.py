"""The passes of the compiled backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from msgspec import Struct

from modelfuse.kernels import Bytes, Extent, Work
from modelfuse.kernels.compiled import histograms, merge_loops
from modelfuse.kernels.compiled.dot_products import LANES
from modelfuse.kernels.compiled.generate import ChainKernels, element_numbers, kernels_of
from modelfuse.kernels.compiled.scratch import RAW_CODES, Scratch, give_back, inputs_of, lay_out, take_scratch
from modelfuse.kernels.gram import gram_of, pairs_of
from modelfuse.kernels.jit.code_cache import prepare
from modelfuse.kernels.measures import (
    Element,
    KeepTables,
    add_up_models,
)
from modelfuse.kernels.order_statistics import FLOAT_ENCODINGS, LEAD_BITS, RANKS, FloatEncoding
from modelfuse.kernels.procedures import Coefficients
from modelfuse.methods.arrays import total

Array = np.ndarray[Any, Any]


def chain_kernels(work: Work) -> ChainKernels:
    """The kernels of a tensor's method."""
    return kernels_of(work.method.chain)


def _laid_out(work: Work, element: Element, names: Sequence[str]) -> Any:
    """The element step's parameters as the kernels take them, with the numbers of these names."""
    keys, numbers = (
        np.array(element.keys, np.uint64),
        element.table(names, work.compute),
    )
    keep = _laid_out_keep(element.keep, work.compute) if work.method.chain.keeps else _no_keep(work.compute)
    return prepare(merge_loops.LaidOutElement(keys, numbers, *keep))


def _laid_out_keep(keep: KeepTables, compute: str) -> list[Any]:
    """The fields of :class:`~modelfuse.kernels.compiled.merge_loops.LaidOutElement` that depend on ranks."""
    tables = keep.tables or [(np.empty(0, np.uint64), np.empty(0))]
    bins = np.concatenate([bins for bins, _ in tables])
    exact = np.empty((0, 1)) if keep.exact is None else keep.exact
    return [
        FLOAT_ENCODINGS[compute].shift,
        ((bins >> np.uint64(1)) | (bins & np.uint64(1)) << np.uint64(LEAD_BITS)).astype(np.uint16),
        np.cumsum([bins.size for bins, _ in tables]),
        np.concatenate([keeps for _, keeps in tables]).astype(compute),
        keep.subtables.astype(compute),
        exact.astype(compute),
    ]


@cache
def _no_keep(compute: str) -> list[Any]:
    """The same fields, empty, for methods without ranks; laid out once."""
    return [prepare(each) for each in _laid_out_keep(KeepTables([], np.ones((0, RANKS)), 0), compute)]


class CompiledState(Struct):
    """The state of a span: the worker's scratch, counts of non-finite elements, and the finding so far."""

    scratch: Scratch
    bad: Array
    found: Any = None


class _Walk:
    """Base class of passes: lays out slices for the kernels."""

    def __init__(self, work: Work) -> None:
        self._work, self._inputs = work, inputs_of(work)

    def start(self) -> CompiledState:
        scratch = take_scratch(self._work)
        return CompiledState(scratch, scratch.bad)

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
        with state.scratch.files.at(first):
            self._run(state, first, count, lay_out(self._inputs, raws, out))

    def _run(self, state: CompiledState, first: int, count: int, data: Any) -> None:
        """Call the kernel on a slice."""
        raise NotImplementedError


class _Chained(_Walk):
    """A pass over elements after the element step."""

    def __init__(self, work: Work, element: Element, names: Sequence[str] | None = None) -> None:
        super().__init__(work)
        self._how = _laid_out(work, element, work.method.chain.element_numbers if names is None else names)

    def start(self) -> CompiledState:
        state = super().start()
        if self._work.method.chain.keeps:
            merge_loops.spread(self._how, state.scratch.buffers)
        return state


class Combine(_Chained):
    """The pass that merges and writes."""

    writes = True

    def __init__(self, work: Work, element: Element, numbers: Coefficients) -> None:
        super().__init__(work, element)
        chain, compute = work.method.chain, work.compute
        self._numbers: Any = prepare(
            merge_loops.Numbers(
                numbers.table(chain.each_numbers, compute),
                numbers.row(chain.shared_numbers, compute),
                np.array([numbers.factor], compute),
                numbers.factor != 1.0,
            )
        )
        self._out_code = RAW_CODES[work.out.name]

    def _run(self, state: CompiledState, first: int, count: int, data: Any) -> None:
        combine = chain_kernels(self._work).combine
        combine(data, first, count, state.scratch.buffers, self._how, self._numbers, self._out_code)


class DotProducts(_Chained):
    """The pass that measures the dot products of all pairs of models.

    Finds float64 sums and their rounding errors, a row for every CHUNK elements: shape (chunks, 2 · products).
    """

    writes = False

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


class Gather(_Walk):
    """The pass that finds the bits of all magnitudes, uint64, shape (models, elements)."""

    writes = False

    def _run(self, state: CompiledState, first: int, count: int, data: Any) -> None:
        state.found = np.empty((self._work.models, count), np.uint64)
        merge_loops.gather(data, count, state.scratch.buffers, state.found)


class ElementSums(_Chained):
    """The pass that sums terms of each model's elements.

    Finds float64 sums and their rounding errors, a row for every CHUNK elements: shape (chunks, models · terms, 2).
    """

    writes = False

    def __init__(self, work: Work, element: Element) -> None:
        terms = work.method.chain.terms
        super().__init__(work, element, element_numbers(terms))
        self._terms = len(terms)

    def start(self) -> CompiledState:
        state = super().start()
        state.found = []
        return state

    def _run(self, state: CompiledState, first: int, count: int, data: Any) -> None:
        rows = self._work.models * self._terms
        sums, lanes = np.empty((math.ceil(count / merge_loops.CHUNK), rows, 2)), np.empty((rows, 2, LANES))
        chain_kernels(self._work).add_up(data, first, count, state.scratch.buffers, self._how, self._terms, lanes, sums)
        state.found.append(sums)

    def _found(self, state: CompiledState) -> Array:
        return np.concatenate(state.found)

    def sums(self, found: list[Any]) -> Array:
        """The sums, float64, shape (models, terms)."""
        parts = np.concatenate(found)
        sums = [total(parts[:, row]) for row in range(parts.shape[1])]
        return np.array(sums).reshape(self._work.models, self._terms)


class TallyAll(_Walk):
    """The pass that tallies all magnitudes; finds, for each model, the non-empty bins and their rows.

    If no sums are needed, a row is only a count.
    """

    writes = False

    def __init__(self, work: Work, encoding: FloatEncoding) -> None:
        super().__init__(work)
        self._encoding, self._sums = encoding, work.method.needs_sums

    def _run(self, state: CompiledState, first: int, count: int, data: Any) -> None:
        buffers, tables = state.scratch.buffers, state.scratch.tables.all
        histograms.tally(data, count, buffers, self._encoding.shift, self._sums, tables)

    def _found(self, state: CompiledState) -> list[tuple[Array, Array]]:
        found, (_, tables, numbers, rows) = [], state.scratch.tables
        for table in tables:
            bins = histograms.collect(table, numbers, rows)
            found.append((numbers.value[:bins].copy(), rows.value[:bins, : 3 if self._sums else 1].copy()))
        return found

    def fold(self, one: list[tuple[Array, Array]], other: list[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
        """The sums of two spans' tallies."""
        return add_up_models(one, other)


class TallyWithin(_Walk):
    """The pass that tallies chosen bins by the next digit; finds uint64 tables, shape (bins, digits, 3)."""

    writes = False

    def __init__(self, work: Work, prefixes: list[Array], shifts: tuple[int, int, int], digit_bits: int) -> None:
        super().__init__(work)
        self._shifts, self._digits = shifts, 1 << digit_bits
        self._prefixes = np.concatenate(prefixes)
        leading = [(own >> np.uint64(shifts[0] - shifts[1])).astype(np.int64) for own in prefixes]
        every = np.concatenate(leading)
        self._lead = int(every.min())
        leads = int(every.max()) - self._lead + 1
        smaller = [np.cumsum(np.bincount(own - self._lead + 1, minlength=leads + 1)) for own in leading]
        starts = np.cumsum([0, *map(len, prefixes[:-1])])
        self._begins = (np.stack(smaller) + starts[:, None]).astype(np.int32)

    def start(self) -> CompiledState:
        state = super().start()
        state.found = np.zeros((self._prefixes.size, self._digits * 3), np.uint64)
        return state

    def _run(self, state: CompiledState, first: int, count: int, data: Any) -> None:
        buffers = state.scratch.buffers
        histograms.tally_within(
            data, count, buffers, self._shifts, self._prefixes, self._lead, self._begins, state.found
        )

    def _found(self, state: CompiledState) -> Array:
        tables: Array = state.found.reshape(-1, self._digits, 3)
        return tables

    def fold(self, one: Array, other: Array) -> Array:
        """The sums of two spans' tables."""
        one += other
        return one
