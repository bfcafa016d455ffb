"""What trim and magprune must know of a whole tensor, from tallies made of a library's own operations.

The searches are those of :mod:`modelfuse.kernels.magnitudes`, so thresholds, factors and probabilities are the same
as the compiled kernels'; only this module and its passes know how a tally looks.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from modelfuse.kernels import Bytes, Pass, Work
from modelfuse.kernels.array import Arithmetic, Sparsifier
from modelfuse.kernels.array_walk import State, Walk
from modelfuse.kernels.cpu import BINS, LEAD_BITS, RANK_BITS
from modelfuse.kernels.library import Array, Library, Tensor
from modelfuse.kernels.magnitudes import LAYOUTS, LOW_BITS, RankTable, Tally, TrimSearch
from modelfuse.methods.random import stream_key

#: Bits of a digit by which a threshold's bin is tallied again.
DIGIT_BITS = 16
#: A tally's tables on the device: counts and two sums for each bin, and what it takes to gather those in use.
TABLE_BYTES = BINS * 32

Measuring = Generator[Pass, list[Any], Sparsifier]


def measure_sparsifier(work: Work, library: Library) -> Measuring:
    """The passes that learn what a sparsifier must know."""
    method, kind = work.method, work.method.sparsify_type
    keys = [stream_key(method.seed, model, work.name) for model in range(work.models)]
    if kind == "trim":
        return (yield from _measure_trim(work, library))
    if kind == "magprune":
        return (yield from _measure_magprune(work, library, keys))
    return Sparsifier(kind, work.compute, method.rescale, keys, [(method.reserve_p, 1.0)] * work.models)


def _measure_trim(work: Work, library: Library) -> Measuring:
    tallies = yield from _tally_all(work, library)
    searches = [TrimSearch(tally, work.method.reserve_p) for tally in tallies]
    while pending := [search for search in searches if search.threshold is None]:
        prefixes = [[search.prefix] if search in pending else [] for search in searches]
        found = yield from _tally_within(work, library, prefixes, pending[0].parent_shift, DIGIT_BITS)
        for search, tally in zip(pending, found, strict=True):
            search.narrow(tally)
    factors = [search.factor() if work.method.rescale else 1.0 for search in searches]
    numbers = [(search.threshold or 0.0, factor) for search, factor in zip(searches, factors, strict=True)]
    return Sparsifier("trim", work.compute, numbers=numbers)


def _measure_magprune(work: Work, library: Library, keys: Sequence[int]) -> Measuring:
    tallies = yield from _tally_all(work, library)
    method = work.method
    ranks = [RankTable(tally, method.reserve_p, method.epsilon) for tally in tallies]
    shift, levels = LAYOUTS[work.compute].shift, 0
    while any(prefixes := [rank.prefixes() for rank in ranks]):
        found = iter((yield from _tally_within(work, library, prefixes, shift, RANK_BITS)))
        for rank, own in zip(ranks, prefixes, strict=True):
            rank.narrow(list(islice(found, len(own))))
        shift, levels = max(shift - RANK_BITS, 0), levels + 1
    bins = np.arange(BINS)
    order = bins >> 1 | (bins & 1) << LEAD_BITS  # The table has the sticky bit in front.
    tables: list[Array] = []
    subtables: list[Array] = []
    for rank in ranks:
        tables.append(rank.table(len(subtables))[order])
        subtables += rank.subtables(len(subtables))
    numbers = [(method.reserve_p, float(rank.active)) for rank in ranks]
    return Sparsifier(
        "magprune", work.compute, method.rescale, keys, numbers, LAYOUTS[work.compute].shift, RANK_BITS, tables,
        np.array(subtables or np.ones((0, 1 << RANK_BITS))), levels,
    )  # fmt: skip


def _tally_all(work: Work, library: Library) -> Generator[Pass, list[Any], list[Tally]]:
    layout = LAYOUTS[work.compute]
    spans = yield TallyAll(work, library)
    tallies = []
    for parts in zip(*spans, strict=True):
        numbers, table = add_up([part for span in parts for part in span])
        tallies.append(Tally(layout, layout.shift, numbers, table, sticky=True))
    return tallies


def add_up(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Bins and their rows of several blocks or spans as one's: ascending numbers, shape (bins,); shape (bins, 3)."""
    if len(parts) == 1:
        return parts[0]
    numbers, places = np.unique(np.concatenate([numbers for numbers, _ in parts]), return_inverse=True)
    table = np.zeros((numbers.size, 3), np.uint64)
    np.add.at(table, places, np.concatenate([rows for _, rows in parts]))
    return numbers, table


def _tally_within(
    work: Work, library: Library, prefixes: list[list[int]], parent_shift: int, digit_bits: int
) -> Generator[Pass, list[Any], list[Tally]]:
    shift = max(parent_shift - digit_bits, 0)
    spans = yield TallyWithin(work, library, prefixes, parent_shift, shift, digit_bits)
    tallies = []
    for prefix, table in zip((each for own in prefixes for each in own), sum(spans), strict=True):
        digits = np.flatnonzero(table[:, 0])
        # The last digits may begin with the prefix's end.
        numbers = np.uint64(prefix << (parent_shift - shift) >> digit_bits << digit_bits) + digits.astype(np.uint64)
        tallies.append(Tally(LAYOUTS[work.compute], shift, numbers, table[digits]))
    return tallies


def _rest_sums(library: Library, arithmetic: Arithmetic, bins: Tensor, rest: Tensor, wide: bool) -> tuple[Tensor, ...]:
    """The sums by bin of the remaining bits' low ones and, if ``wide``, of the others.

    Each sum stays far below 2⁵³, so float64 adds it up exactly in any order.
    """
    if not wide:
        return (library.bincount(bins, 0, library.cast(rest, "float64")),)
    low = rest & arithmetic.integer((1 << LOW_BITS) - 1)
    high = library.shift_right(rest, LOW_BITS)
    return tuple(library.bincount(bins, 0, library.cast(part, "float64")) for part in (low, high))


class TallyAll(Walk):
    """The pass that tallies all magnitudes; finds, for each model, the bins that hold any and their rows, by block."""

    fixed = TABLE_BYTES
    scratch = 40

    def __init__(self, work: Work, library: Library) -> None:
        super().__init__(work, library)
        self._shift = LAYOUTS[work.compute].shift
        self._sums = work.method.sparsify_type == "trim"

    def start(self) -> State:
        return self._state([[] for _ in range(self._work.models)])

    def block(self, state: State, first: int, xs: list[Tensor], base: Tensor | None, out: Bytes) -> None:
        library, arithmetic = self._library, self._arithmetic
        for model, parts in enumerate(state.found):
            bits = arithmetic.magnitude_bits(xs[model])
            xs[model] = None
            bins, rest = arithmetic.bins(bits, self._shift), arithmetic.low_bits(bits, self._shift)
            counts = library.bincount(bins, 0)
            used = library.places(counts != arithmetic.integer(0))
            wide = self._work.compute == "float64"
            sums = _rest_sums(library, arithmetic, bins, rest, wide) if self._sums else ()
            rows = np.zeros((used.shape[0], 3), np.uint64)
            for column, values in enumerate((counts, *sums)):
                rows[:, column] = library.fetch(library.take(values, used))
            parts.append((library.fetch(used).astype(np.uint64), rows))

    def finish(self, state: State) -> list[list[tuple[Array, Array]]]:
        return [[add_up(parts)] for parts in state.found]


class TallyWithin(Walk):
    """The pass that tallies chosen bins by their next digits; finds uint64 tables, shape (bins, digits, 3)."""

    once = False
    scratch = 80

    def __init__(
        self, work: Work, library: Library, prefixes: list[list[int]], parent_shift: int, shift: int, digit_bits: int
    ) -> None:
        super().__init__(work, library)
        self._prefixes, self._shifts, self._digits = prefixes, (parent_shift, shift), 1 << digit_bits
        self.fixed = max(map(len, prefixes)) * self._digits * 32

    def start(self) -> State:
        found = np.zeros((sum(map(len, self._prefixes)), self._digits, 3), np.uint64)
        with self._library.working():
            placed = [self._library.place(np.array(own, np.int64)) for own in self._prefixes]
        return self._state(found, placed)

    def block(self, state: State, first: int, xs: list[Tensor], base: Tensor | None, out: Bytes) -> None:
        library, arithmetic = self._library, self._arithmetic
        row = 0
        for model, own in enumerate(self._prefixes):
            bits = arithmetic.magnitude_bits(xs[model])
            xs[model] = None
            if own:
                slots, chosen = self._slots(library.cast(bits, "int64"), state.placed[model])
                if slots.shape[0]:
                    self._count(state.found[row : row + len(own)], slots, chosen)
            row += len(own)

    def _slots(self, bits: Tensor, prefixes: Tensor) -> tuple[Tensor, Tensor]:
        """For the magnitudes in the chosen bins: where each is counted, and its bits."""
        library, arithmetic = self._library, self._arithmetic
        parent_shift, shift = self._shifts
        leading = library.shift_right(bits, parent_shift)
        rows = library.find(prefixes, leading)
        # Beyond the last prefix there is none to compare with.
        rows = rows - library.cast(rows >= arithmetic.integer(prefixes.shape[0]), "int64")
        hits = library.places(library.take(prefixes, rows) == leading)
        chosen = library.take(bits, hits)
        digits = library.shift_right(chosen, shift) & arithmetic.integer(self._digits - 1)
        return library.take(rows, hits) * arithmetic.integer(self._digits) + digits, chosen

    def _count(self, table: Array, slots: Tensor, bits: Tensor) -> None:
        library, arithmetic = self._library, self._arithmetic
        rest = arithmetic.low_bits(bits, self._shifts[1], "int64")
        counted = (library.bincount(slots, 0), *_rest_sums(library, arithmetic, slots, rest, True))
        for column, values in enumerate(counted):
            flat = library.fetch(values).astype(np.uint64)
            rows = np.zeros(table.shape[0] * self._digits, np.uint64)
            rows[: flat.size] = flat
            table[:, :, column] += rows.reshape(-1, self._digits)

    def finish(self, state: State) -> Array:
        tables: Array = state.found
        return tables
