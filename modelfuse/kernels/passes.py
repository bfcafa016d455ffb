"""Merging one tensor with the compiled kernels: which passes, and what each one learns."""

from __future__ import annotations

import math
import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelfuse.dtypes import BF16, F16, F32, F64
from modelfuse.kernels import Bytes, Pass, Procedure, Work, cpu, tallying
from modelfuse.kernels.machine_code import prepare
from modelfuse.kernels.magnitudes import LAYOUTS, Layout
from modelfuse.kernels.measuring import add_up_models, measure_ranks, measure_thresholds
from modelfuse.methods.arrays import total
from modelfuse.methods.random import stream_key
from modelfuse.methods.slerp import coefficients

Array = np.ndarray[Any, Any]

RAW_CODES = {F32.name: cpu.RAW_F32, F64.name: cpu.RAW_F64, BF16.name: cpu.RAW_BF16, F16.name: cpu.RAW_F16}


def merge_procedure(work: Work) -> Procedure:
    """The passes that merge one tensor on the CPU."""
    sparsifier = yield from _measure_sparsifier(work)
    weights, merge = work.method.weights, cpu.LINEAR
    if work.method.merge_type == "slerp":
        sums = yield DotProducts(work, sparsifier)
        weights = _slerp_weights(work, np.concatenate(sums))
    elif work.method.merge_type == "ties":
        merge = cpu.TIES_COUNT if work.method.ties_elect_type == "count" else cpu.TIES_SUM
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

    def within(
        self, work: Work, prefixes: list[list[int]], parent_shift: int, shift: int, digit_bits: int
    ) -> TallyWithin:
        return TallyWithin(work, prefixes, (LAYOUTS[work.compute].shift, parent_shift, shift), digit_bits)


def _measure_sparsifier(work: Work) -> Generator[Pass, list[Any], cpu.Sparsifier]:
    kind = work.method.sparsify_type
    if kind == "trim":
        return _sparsifier(work, cpu.TRIM, (yield from measure_thresholds(work, _Tallies())))
    if kind == "magprune":
        ranks = yield from measure_ranks(work, _Tallies())
        return _sparsifier(work, cpu.MAGPRUNE, ranks.numbers, ranks.tables, ranks.subtables)
    numbers = [(work.method.reserve_p, 1.0)] * work.models
    return _sparsifier(work, cpu.DARE if kind == "dare" else cpu.NO_SPARSIFIER, numbers)


def _sparsifier(
    work: Work,
    kind: int,
    numbers: list[tuple[float, float]],
    tables: list[Array] | None = None,
    subtables: list[Array] | None = None,
) -> cpu.Sparsifier:
    return cpu.Sparsifier(
        kind,
        work.method.rescale,
        np.array([stream_key(work.method.seed, model, work.name) for model in range(work.models)], np.uint64),
        np.array(numbers, work.compute),
        LAYOUTS[work.compute].shift,
        np.array(tables, work.compute) if tables else np.ones((work.models, 0), work.compute),
        np.array(subtables, work.compute) if subtables else np.ones((0, cpu.RANKS), work.compute),
    )


@dataclass
class State:
    """A span under way: a worker's room, also as laid out for the kernels, and what it found so far."""

    room: cpu.Room
    laid: Any
    codes: Array
    deltas: Array
    stored: Any = None
    found: Any = None

    @property
    def bad(self) -> Array:
        """The counts of non-finite elements."""
        return self.room.bad


class _Walk:
    """What all passes share: a tensor's slices as the kernels take them."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def start(self) -> State:
        work, sources = self._work, len(self._work.sources)
        x, bits = np.zeros((_up(work.models) + 1, cpu.BLOCK), work.compute), np.empty(cpu.BLOCK, np.uint64)
        room = cpu.Room(
            x,
            x.view(np.uint32),
            x.view(np.uint64),
            np.empty((3, cpu.BLOCK), work.compute),
            np.empty(cpu.BLOCK, np.float32),
            bits,
            bits.view(np.uint32),
            np.empty(cpu.BLOCK, np.uint16),
            np.zeros(sources + 1, np.int64),
        )
        codes = np.array([RAW_CODES[source.name] for source in work.sources], np.int64)
        return State(room, prepare(room), codes, np.array(work.deltas or (False,) * work.models))

    def _stored(self, state: State, raws: Bytes, out: Bytes) -> Any:
        """The buffers as kernels take them: a span's are the same from slice to slice."""
        if state.stored is None or state.stored.value.raws is not raws or state.stored.value.out is not out:
            work, out_halves = self._work, out[: out.size & -2].view(np.uint16)
            stored = cpu.Stored(
                raws, raws.view(np.uint16), state.codes, work.models, work.has_base, state.deltas, out, out_halves
            )
            state.stored = prepare(stored)
        return state.stored


def _up(models: int) -> int:
    """So many models, and rows of zeros."""
    return -(-models // cpu.TOGETHER) * cpu.TOGETHER


class Combine(_Walk):
    """The pass that merges and writes."""

    writes = True

    def __init__(self, work: Work, sparsifier: cpu.Sparsifier, merge: int, weights: tuple[float, ...]) -> None:
        super().__init__(work)
        self._how: Any = prepare(sparsifier)
        padded = [*weights, *[0.0] * (_up(work.models) - work.models)]
        self._weights: Any = prepare(np.array(padded, work.compute))
        self._numbers = merge, work.method.normalize, RAW_CODES[work.out.name]

    def apply(self, state: State, first: int, count: int, raws: Bytes, out: Bytes) -> None:
        data, (merge, normalize, out_code) = self._stored(state, raws, out), self._numbers
        cpu.combine(data, first, count, state.laid, self._how, merge, self._weights, normalize, out_code)

    def finish(self, state: State) -> None:
        return None


class DotProducts(_Walk):
    """The pass that measures slerp's norms and dot product; finds float64 sums a chunk, shape (chunks, 6)."""

    writes = False

    def __init__(self, work: Work, sparsifier: cpu.Sparsifier) -> None:
        super().__init__(work)
        self._sparsifier: Any = prepare(sparsifier)

    def start(self) -> State:
        state = super().start()
        state.found = []
        return state

    def apply(self, state: State, first: int, count: int, raws: Bytes, out: Bytes) -> None:
        sums, lanes = np.empty((math.ceil(count / cpu.CHUNK), 6)), np.empty((6, cpu.LANES))
        cpu.dot_products(self._stored(state, raws, out), first, count, state.laid, self._sparsifier, lanes, sums)
        state.found.append(sums)

    def finish(self, state: State) -> Array:
        return np.concatenate(state.found)


class _Tables(threading.local):
    """Each worker's tables of counts, all zero between two spans."""

    empty: Array | None = None


_tables = _Tables()


class TallyAll(_Walk):
    """The pass that tallies all magnitudes; finds, for each model, the bins that hold any, and their rows.

    Where only ranks matter, a row is a count.
    """

    writes = False

    def __init__(self, work: Work, layout: Layout) -> None:
        super().__init__(work)
        self._layout, self._sums = layout, work.method.sparsify_type == "trim"
        self._shape = work.models, cpu.BINS * (1 if work.compute == "float32" else 3)

    def start(self) -> State:
        state = super().start()
        # While they are in use nobody has them, so that tables left by a failure are never used again.
        empty, _tables.empty = _tables.empty, None
        state.found = empty if empty is not None and empty.shape == self._shape else np.zeros(self._shape, np.uint64)
        return state

    def apply(self, state: State, first: int, count: int, raws: Bytes, out: Bytes) -> None:
        tallying.tally(self._stored(state, raws, out), count, state.laid, self._layout.shift, self._sums, state.found)

    def finish(self, state: State) -> list[tuple[Array, Array]]:
        found = []
        for table in state.found:
            numbers, rows = np.empty(cpu.BINS, np.uint64), np.empty((cpu.BINS, 3), np.uint64)
            bins = tallying.collect(table, numbers, rows)
            found.append((numbers[:bins].copy(), rows[:bins, : 3 if self._sums else 1].copy()))
        _tables.empty = state.found
        return found

    def fold(self, one: list[tuple[Array, Array]], other: list[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
        """The sums of two spans' tallies."""
        return add_up_models(one, other)


class TallyWithin(_Walk):
    """The pass that tallies chosen bins by their next digits; finds uint64 tables, shape (bins, digits, 3)."""

    writes = False

    def __init__(self, work: Work, prefixes: list[list[int]], shifts: tuple[int, int, int], digit_bits: int) -> None:
        super().__init__(work)
        self._shifts, self._digits = shifts, 1 << digit_bits
        self._prefixes = np.array([prefix for own in prefixes for prefix in own], np.uint64)
        leads = np.arange(cpu.LEADS + 1)
        ends = np.cumsum([0, *map(len, prefixes)])
        leading = [np.array(own, np.int64) >> (shifts[0] - shifts[1]) for own in prefixes]
        self._begins = np.stack(
            [np.searchsorted(own, leads) + end for own, end in zip(leading, ends[:-1], strict=True)]
        ).astype(np.int32)

    def start(self) -> State:
        state = super().start()
        state.found = np.zeros((self._prefixes.size, self._digits * 3), np.uint64)
        return state

    def apply(self, state: State, first: int, count: int, raws: Bytes, out: Bytes) -> None:
        data = self._stored(state, raws, out)
        tallying.tally_within(data, count, state.laid, self._shifts, self._prefixes, self._begins, state.found)

    def finish(self, state: State) -> Array:
        tables: Array = state.found.reshape(-1, self._digits, 3)
        return tables

    def fold(self, one: Array, other: Array) -> Array:
        """The sums of two spans' tables."""
        one += other
        return one
