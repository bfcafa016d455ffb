"""What trim and magprune must know of a whole tensor: which passes tally it, and what is made of their tallies.

Written once for all kernels: what differs is the two passes. Those that fold leave what spans found to be added up
by whoever drives them, or here.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import reduce
from typing import Any, NamedTuple, Protocol

import numpy as np

from modelfuse.kernels import Pass, Work
from modelfuse.kernels.compiled.merge_loops import DIGIT_BITS, RANK_BITS
from modelfuse.kernels.order_statistics import LAYOUTS, RankTable, Tally, TrimSearch, first_within

Array = np.ndarray[Any, Any]
Passes = Generator[Pass, list[Any], Any]


class TallyPass(Pass, Protocol):
    """A pass whose findings are sums."""

    def fold(self, one: Any, other: Any) -> Any:
        """The sums of two spans."""


class Tallies(Protocol):
    """The passes of one kind of kernel that tally a tensor."""

    def all(self, work: Work) -> TallyPass:
        """Tallies all magnitudes; finds, for each model, what :func:`add_up` adds up."""

    def within(self, work: Work, prefixes: list[Array], parent_shift: int, shift: int, digit_bits: int) -> TallyPass:
        """Tallies chosen bins by their next digits; finds uint64 tables, shape (bins, digits, 3).

        ``prefixes`` are the bins' leading bits, uint64, ascending, one array a model.
        """


class Ranks(NamedTuple):
    """What magprune must know of all models.

    Attributes:
        numbers: The mean probability, and whether there is anything to drop, a pair a model.
        tables: A pair a model: the bins that hold any magnitude, as in :class:`Tally`, and their probabilities,
            float64; −(slot + 1) for a subtable.
        subtables: The same by the next digit, for each bin that was tallied again, shape (bins, RANKS).
        levels: How often bins were tallied again.
    """

    numbers: list[tuple[float, float]]
    tables: list[tuple[Array, Array]]
    subtables: Array
    levels: int


def measure_thresholds(work: Work, passes: Tallies) -> Passes:
    """trim's threshold and factor, a pair a model."""
    layout = LAYOUTS[work.compute]
    searches = [TrimSearch(tally, work.method.reserve_p) for tally in (yield from _tally_all(work, passes))]
    while pending := [search for search in searches if search.threshold is None]:
        prefixes = [np.array([each.prefix] if each in pending else [], np.uint64) for each in searches]
        tables = yield from _tally_within(work, passes, prefixes, pending[0].parent_shift, DIGIT_BITS)
        for search, table in zip(pending, tables, strict=True):
            digits = np.flatnonzero(table[:, 0])
            first = first_within(np.array(search.prefix, np.uint64), search.parent_shift, DIGIT_BITS)
            numbers = first + digits.astype(np.uint64)
            search.narrow(Tally(layout, max(search.parent_shift - DIGIT_BITS, 0), numbers, table[digits]))
    factors = [search.factor() if work.method.rescale else 1.0 for search in searches]
    return [(search.threshold or 0.0, factor) for search, factor in zip(searches, factors, strict=True)]


def measure_ranks(work: Work, passes: Tallies) -> Passes:
    """magprune's :class:`Ranks`."""
    method = work.method
    models = [RankTable(tally, method.reserve_p, method.epsilon) for tally in (yield from _tally_all(work, passes))]
    shift, levels = LAYOUTS[work.compute].shift, 0
    while sum(map(len, prefixes := [model.prefixes for model in models])):
        tables = yield from _tally_within(work, passes, prefixes, shift, RANK_BITS)
        parts = np.split(tables, np.cumsum([len(own) for own in prefixes[:-1]]))
        for model, part in zip(models, parts, strict=True):
            model.narrow(part, shift)
        shift, levels = max(shift - RANK_BITS, 0), levels + 1
    found: list[tuple[Array, Array]] = []
    subtables: list[Array] = []
    for model in models:
        slots = sum(map(len, subtables))
        found.append(model.table(slots))
        subtables.append(model.subtables(slots))
    return Ranks(
        [(method.reserve_p, float(model.active)) for model in models], found, np.concatenate(subtables), levels
    )


def _tally_all(work: Work, passes: Tallies) -> Passes:
    layout, pass_ = LAYOUTS[work.compute], passes.all(work)
    spans = yield pass_
    return [Tally(layout, layout.shift, numbers, rows, sticky=True) for numbers, rows in reduce(pass_.fold, spans)]


def _tally_within(work: Work, passes: Tallies, prefixes: list[Array], parent_shift: int, digit_bits: int) -> Passes:
    pass_ = passes.within(work, prefixes, parent_shift, max(parent_shift - digit_bits, 0), digit_bits)
    return reduce(pass_.fold, (yield pass_))


def add_up(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Bins and rows of several blocks or spans as one's: numbers, shape (bins,), ascending; shape (bins, sums)."""
    if len(parts) == 1:
        return parts[0]
    numbers = np.unique(np.concatenate([numbers for numbers, _ in parts]))
    rows = np.zeros((numbers.size, parts[0][1].shape[1]), np.uint64)
    for own, part in parts:
        rows[np.searchsorted(numbers, own)] += part
    return numbers, rows


def add_up_models(
    one: Sequence[tuple[Array, Array]], other: Sequence[tuple[Array, Array]]
) -> list[tuple[Array, Array]]:
    """The same of two spans, model by model."""
    return [add_up(pair) for pair in zip(one, other, strict=True)]
