"""Merging one tensor with the compiled kernels: which passes, and what each one learns."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelfuse.kernels import Bytes, Extent, Pass, Procedure, Work
from modelfuse.kernels.compiled import dot_products, histograms, merge_loops
from modelfuse.kernels.compiled.scratch import RAW_CODES, Scratch, give_back, inputs_of, lay_out, take_scratch, up
from modelfuse.kernels.jit.code_cache import prepare
from modelfuse.kernels.measures import Ranks, add_up_models, measure_ranks, measure_thresholds
from modelfuse.kernels.order_statistics import LAYOUTS, Layout
from modelfuse.methods.arrays import total
from modelfuse.methods.random import stream_key
from modelfuse.methods.slerp import coefficients

Array = np.ndarray[Any, Any]


def merge_procedure(work: Work) -> Procedure:
    """The passes that merge one tensor on the CPU."""
    sparsifier = yield from _measure_sparsifier(work)
    weights, merge = work.method.weights, merge_loops.LINEAR
    if work.method.merge_type == "slerp":
        sums = yield DotProducts(work, sparsifier)
        weights = _slerp_weights(work, np.concatenate(sums))
    elif work.method.merge_type == "ties":
        merge = merge_loops.TIES_COUNT if work.method.ties_elect_type == "count" else merge_loops.TIES_SUM
    yield Combine(work, sparsifier, merge, weights)


def _slerp_weights(work: Work, sums: Array) -> tuple[float, float]:
    method = work.method
    squares_1, squares_2, dots = (total(sums[:, [product, product + 3]]) for product in range(3))
    return coefficients(
        squares_1, squares_2, dots, method.slerp_alpha, method.slerp_normalize_eps, method.slerp_dot_threshold
    )


class _Tallies:
    """The compiled passes that tally."""

    def all(self, work: Work) -> TallyAll:
        return TallyAll(work, LAYOUTS[work.compute])

    def within(self, work: Work, prefixes: list[Array], parent_shift: int, shift: int, digit_bits: int) -> TallyWithin:
        return TallyWithin(work, prefixes, (LAYOUTS[work.compute].shift, parent_shift, shift), digit_bits)


def _measure_sparsifier(work: Work) -> Generator[Pass, list[Any], merge_loops.Sparsifier]:
    kind = work.method.sparsify_type
    if kind == "trim":
        return _sparsifier(work, merge_loops.TRIM, (yield from measure_thresholds(work, _Tallies())))
    if kind == "magprune":
        ranks: Ranks = yield from measure_ranks(work, _Tallies())
        return _sparsifier(work, merge_loops.MAGPRUNE, ranks.numbers, ranks)
    numbers = [(work.method.reserve_p, 1.0)] * work.models
    return _sparsifier(work, merge_loops.DARE if kind == "dare" else merge_loops.NO_SPARSIFIER, numbers)


def _sparsifier(
    work: Work, kind: int, numbers: list[tuple[float, float]], ranks: Ranks | None = None
) -> merge_loops.Sparsifier:
    tables = ranks.tables if ranks else [(np.empty(0, np.uint64), np.empty(0))]
    bins = np.concatenate([bins for bins, _ in tables])
    return merge_loops.Sparsifier(
        kind,
        work.method.rescale,
        np.array([stream_key(work.method.seed, model, work.name) for model in range(work.models)], np.uint64),
        np.array(numbers, work.compute),
        LAYOUTS[work.compute].shift,
        ((bins >> np.uint64(1)) | (bins & np.uint64(1)) << np.uint64(merge_loops.LEAD_BITS)).astype(np.uint16),
        np.cumsum([bins.size for bins, _ in tables]),
        np.concatenate([keeps for _, keeps in tables]).astype(work.compute),
        (ranks.subtables if ranks else np.ones((0, merge_loops.RANKS))).astype(work.compute),
    )


@dataclass
class State:
    """A span under way: a worker's scratch, the counts of non-finite elements, and what it found so far."""

    scratch: Scratch
    bad: Array
    found: Any = None


class _Walk:
    """What all passes share: a tensor's slices as the kernels take them."""

    def __init__(self, work: Work) -> None:
        self._work, self._inputs = work, inputs_of(work)

    def start(self) -> State:
        scratch = take_scratch(self._work)
        return State(scratch, scratch.bad)

    def finish(self, state: State) -> Any:
        found = self._found(state)
        state.bad = state.bad.copy()
        give_back(state.scratch)
        return found

    def _found(self, state: State) -> Any:
        return state.found

    def read_from(self, state: State, extents: Sequence[Extent]) -> bool:
        state.scratch.files.read_from(extents, self._work.sources)
        return True

    def apply(self, state: State, first: int, count: int, raws: Bytes, out: Bytes) -> None:
        with state.scratch.files.at(first):
            self._run(state, first, count, lay_out(self._inputs, raws, out))

    def _run(self, state: State, first: int, count: int, data: Any) -> None:
        """Call the kernel on a slice."""
        raise NotImplementedError


class _Sparsifying(_Walk):
    """A pass that sparsifies what it reads."""

    def __init__(self, work: Work, sparsifier: merge_loops.Sparsifier) -> None:
        super().__init__(work)
        self._how: Any = prepare(sparsifier)

    def start(self) -> State:
        state = super().start()
        if self._work.method.sparsify_type == "magprune":
            merge_loops.spread(self._how, state.scratch.room)
        return state


class Combine(_Sparsifying):
    """The pass that merges and writes."""

    writes = True

    def __init__(self, work: Work, sparsifier: merge_loops.Sparsifier, merge: int, weights: tuple[float, ...]) -> None:
        super().__init__(work, sparsifier)
        padded = [*weights, *[0.0] * (up(work.models) - work.models)]
        self._weights: Any = prepare(np.array(padded, work.compute))
        self._numbers = merge, work.method.normalize, RAW_CODES[work.out.name]

    def _run(self, state: State, first: int, count: int, data: Any) -> None:
        room, (merge, normalize, out_code) = state.scratch.room, self._numbers
        merge_loops.combine(data, first, count, room, self._how, merge, self._weights, normalize, out_code)


class DotProducts(_Sparsifying):
    """The pass that measures slerp's norms and dot product; finds float64 sums a chunk, shape (chunks, 6)."""

    writes = False

    def start(self) -> State:
        state = super().start()
        state.found = []
        return state

    def _run(self, state: State, first: int, count: int, data: Any) -> None:
        sums, lanes = np.empty((math.ceil(count / merge_loops.CHUNK), 6)), np.empty((6, dot_products.LANES))
        dot_products.dot_products(data, first, count, state.scratch.room, self._how, lanes, sums)
        state.found.append(sums)

    def _found(self, state: State) -> Array:
        return np.concatenate(state.found)


class TallyAll(_Walk):
    """The pass that tallies all magnitudes; finds, for each model, the bins that hold any, and their rows.

    Where only ranks matter, a row is a count.
    """

    writes = False

    def __init__(self, work: Work, layout: Layout) -> None:
        super().__init__(work)
        self._layout, self._sums = layout, work.method.sparsify_type == "trim"

    def _run(self, state: State, first: int, count: int, data: Any) -> None:
        room, tables = state.scratch.room, state.scratch.tables.all
        histograms.tally(data, count, room, self._layout.shift, self._sums, tables)

    def _found(self, state: State) -> list[tuple[Array, Array]]:
        found, (_, tables, numbers, rows) = [], state.scratch.tables
        for table in tables:
            bins = histograms.collect(table, numbers, rows)
            found.append((numbers.value[:bins].copy(), rows.value[:bins, : 3 if self._sums else 1].copy()))
        return found

    def fold(self, one: list[tuple[Array, Array]], other: list[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
        """The sums of two spans' tallies."""
        return add_up_models(one, other)


class TallyWithin(_Walk):
    """The pass that tallies chosen bins by their next digits; finds uint64 tables, shape (bins, digits, 3)."""

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

    def start(self) -> State:
        state = super().start()
        state.found = np.zeros((self._prefixes.size, self._digits * 3), np.uint64)
        return state

    def _run(self, state: State, first: int, count: int, data: Any) -> None:
        room = state.scratch.room
        histograms.tally_within(data, count, room, self._shifts, self._prefixes, self._lead, self._begins, state.found)

    def _found(self, state: State) -> Array:
        tables: Array = state.found.reshape(-1, self._digits, 3)
        return tables

    def fold(self, one: Array, other: Array) -> Array:
        """The sums of two spans' tables."""
        one += other
        return one
