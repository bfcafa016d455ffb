"""The passes of the compiled backend that tally magnitudes: of the models' elements, or of what is made of them all."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelfuse.kernels import Work
from modelfuse.kernels.compiled import histograms
from modelfuse.kernels.compiled.passes import CompiledState, MadeElements, Walk
from modelfuse.kernels.element import Merged
from modelfuse.kernels.jit.code_cache import prepare
from modelfuse.kernels.measures import add_up_models
from modelfuse.kernels.order_statistics import FLOAT_ENCODINGS

Array = np.ndarray[Any, Any]


class _Tally(Walk):
    """A pass that tallies magnitudes: of the models' elements or, with ``merged``, of an expression of them all."""

    _bins: Any
    _made: MadeElements | None

    def __init__(self, work: Work, merged: Merged | None) -> None:
        super().__init__(work)
        self._made, self._sums = None, work.method.needs_sums
        if merged is not None:
            self._prepare(merged.element, work.method.chain.element_numbers)
            self._made, self._sums = MadeElements.of(work, merged.numbers, (merged.expression,)), merged.sums

    @property
    def _models(self) -> int:
        """How many tensors' magnitudes are tallied."""
        return self._work.models if self._made is None else self._made.models

    @property
    def _rows(self) -> int:
        rows, made = super()._rows, self._made
        return rows if made is None else max(rows, made.kernels(self._work).combination.rows_for(self._work.models))

    def _count(self, state: CompiledState, first: int, count: int, data: Any, tables: Any) -> None:
        """Call the kernel on a slice."""
        made, buffers = self._made, state.scratch.buffers
        if made is None:
            histograms.tally(data, count, buffers, self._bins, tables)
        else:
            tally = made.kernels(self._work).tally
            tally(data, first, count, buffers, self._how, made.numbers, made.models, self._bins, tables)


class TallyAll(_Tally):
    """The pass that tallies all magnitudes; finds, for each model, the non-empty bins and their rows.

    If no sums are needed, a row is only a count.
    """

    def __init__(self, work: Work, merged: Merged | None = None) -> None:
        super().__init__(work, merged)
        shifts, none = (FLOAT_ENCODINGS[work.compute].shift, 0, 0), np.zeros((1, 1), np.int32)
        self._bins = prepare(histograms.Bins(False, self._sums, shifts, np.empty(0, np.uint64), 0, none))

    def _run(self, state: CompiledState, first: int, count: int, data: Any) -> None:
        self._count(state, first, count, data, state.scratch.tables.all)

    def _found(self, state: CompiledState) -> list[tuple[Array, Array]]:
        found, (_, tables, numbers, rows) = [], state.scratch.tables
        for table in tables[: self._models]:
            bins = histograms.collect(table, numbers, rows)
            found.append((numbers.value[:bins].copy(), rows.value[:bins, : 3 if self._sums else 1].copy()))
        return found

    def fold(self, one: list[tuple[Array, Array]], other: list[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
        """The sums of two spans' tallies."""
        return add_up_models(one, other)


class TallyWithin(_Tally):
    """The pass that tallies chosen bins by the next digit; finds uint64 tables, shape (bins, digits, 3)."""

    def __init__(
        self, work: Work, prefixes: list[Array], shifts: tuple[int, int], digit_bits: int, merged: Merged | None = None
    ) -> None:
        super().__init__(work, merged)
        self._digits, every = 1 << digit_bits, np.concatenate(prefixes)
        shift = FLOAT_ENCODINGS[work.compute].shift
        leading = [(own >> np.uint64(shift - shifts[0])).astype(np.int64) for own in prefixes]
        together = np.concatenate(leading)
        first = int(together.min())
        leads = int(together.max()) - first + 1
        smaller = [np.cumsum(np.bincount(own - first + 1, minlength=leads + 2)) for own in leading]
        starts = np.cumsum([0, *map(len, prefixes[:-1])])
        begins = (np.stack(smaller) + starts[:, None]).astype(np.int32)
        self._bins = prepare(histograms.Bins(True, self._sums, (shift, *shifts), every, first, begins))
        self._tables = every.size, self._digits * 3

    def start(self) -> CompiledState:
        state = super().start()
        state.found = np.zeros(self._tables, np.uint64)
        return state

    def _run(self, state: CompiledState, first: int, count: int, data: Any) -> None:
        self._count(state, first, count, data, state.found)

    def _found(self, state: CompiledState) -> Array:
        tables: Array = state.found.reshape(-1, self._digits, 3)
        return tables

    def fold(self, one: Array, other: Array) -> Array:
        """The sums of two spans' tables."""
        one += other
        return one
