"""Measure what the element step needs to know of whole tensors: the passes, and the evaluation of their findings.

Written once for all backends, which differ in their passes. Findings of passes with ``fold`` are reduced by the
scheduler, and here for what remains.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from functools import reduce
from typing import Any, Protocol

import numpy as np
from msgspec.structs import replace

from modelfuse.kernels import Pass, Work
from modelfuse.kernels.element import Element, KeepTables, Merged
from modelfuse.kernels.lines import LineKeep, Lines
from modelfuse.kernels.order_statistics import (
    DIGIT_BITS,
    FLOAT_ENCODINGS,
    RANK_BITS,
    RANKS,
    Found,
    RankSearch,
    RankTable,
    Tally,
    first_within,
    shares_no_ranks,
)
from modelfuse.kernels.sorted_magnitudes import MOST, SortedMagnitudes
from modelfuse.methods.expressions import Expression
from modelfuse.methods.random import stream_key
from modelfuse.methods.spec import LineRanks, Magnitudes, OrderStatistics, Ranks

Array = np.ndarray[Any, Any]
Passes = Generator[Pass, list[Any], Any]


class TallyPass(Pass, Protocol):
    """A pass whose findings are sums, folded by addition."""

    def fold(self, one: Any, other: Any) -> Any:
        """Add the findings of two spans."""


class GatherPass(Pass, Protocol):
    """A pass that finds the bits of all magnitudes of a tensor that fits in one span.

    They are uint32 or uint64, shape (models, elements).
    """


class SumsPass(Pass, Protocol):
    """A pass that sums terms."""

    def sums(self, found: list[Any]) -> Array:
        """The sums, float64, shape (models, terms), from the findings of the spans, in order."""


class FragmentsPass(Pass, Protocol):
    """A pass that finds the pieces of groups of lines that slices cut: a list for each span."""


class Tallies(Protocol):
    """The tally passes of a backend: of the models' magnitudes or, with ``merged``, of an expression of all models."""

    def gather(self, work: Work) -> GatherPass:
        """Collects the magnitudes of a small tensor."""

    def all(self, work: Work, merged: Merged | None = None) -> TallyPass:
        """Tallies all magnitudes; finds, for each model, bins and rows for :func:`add_up`."""

    def within(
        self,
        work: Work,
        prefixes: list[Array],
        parent_shift: int,
        shift: int,
        digit_bits: int,
        merged: Merged | None = None,
    ) -> TallyPass:
        """Tallies magnitudes in chosen bins by the next digit; finds uint64 tables, shape (bins, digits, 3).

        ``prefixes`` are the bins' leading bits: uint64, ascending, one array per model.
        """


class ElementPasses(Tallies, Protocol):
    """The passes of a backend that measure for the element step."""

    def element_sums(self, work: Work, element: Element, terms: Sequence[Expression]) -> SumsPass:
        """Sums terms of each model's elements, before the element step."""

    def fragments(self, work: Work, lines: Lines) -> FragmentsPass:
        """Collects the pieces of groups of lines that slices cut."""


def measure_element(work: Work, passes: ElementPasses) -> Passes:
    """The :class:`Element` of a tensor."""
    method, sparsifier = work.method, work.method.sparsifier
    if sparsifier is None:
        return Element(numbers=[{}] * work.models)
    keys = [stream_key(method.seed, method.stream(model), work.name) for model in range(work.models)]
    settings = [method.of(model) for model in range(work.models)]
    numbers = [{**method.numbers_of(model), **sparsifier.numbers(own)} for model, own in enumerate(settings)]
    element = Element(keys, numbers)
    for measure in method.element_measures:
        if isinstance(measure, OrderStatistics):
            found = yield from measure_magnitudes(work, passes, measure, settings, method.needs_sums)
            for own, more in zip(numbers, found, strict=True):
                own.update(more)
        elif isinstance(measure, Ranks):
            element = replace(element, keep=(yield from _measure_ranks(work, passes, measure)))
        elif isinstance(measure, LineRanks):
            element = replace(element, lines=(yield from _measure_lines(work, passes, measure)))
        else:
            pass_ = passes.element_sums(work, element, method.traced(measure.terms, merged=False))
            sums = pass_.sums((yield pass_))
            for name, values in measure.numbers(sums, work.size, method.shared).items():
                for own, value in zip(numbers, values, strict=True):
                    own[name] = value
    return element


def measure_magnitudes(
    work: Work,
    passes: Tallies,
    measure: OrderStatistics,
    settings: Sequence[Any],
    sums: bool,
    merged: Merged | None = None,
) -> Generator[Pass, list[Any], list[Mapping[str, float]]]:
    """Measure order statistics of magnitudes.

    Args:
        work: The tensor.
        passes: The passes of the backend.
        measure: What is measured.
        settings: The settings of each model; with ``merged``, for each tensor that is made of all models.
        sums: Whether sums of magnitudes are needed.
        merged: The expression of all models' elements whose magnitudes are measured, instead of each model's.

    Returns:
        The measure's numbers, for each item of ``settings``.
    """
    is_small = work.size <= MOST and merged is None
    models = yield from (_gather(work, passes) if is_small else _tally_all(work, passes, merged))
    zeros = [_zeros(each) if measure.nonzero else 0 for each in models]
    ranks = [
        [zero + rank for rank in measure.ranks(work.size - zero, known)]
        for zero, known in zip(zeros, settings, strict=True)
    ]
    found: Sequence[Magnitudes]
    if is_small:
        found = [each.at_ranks(own) for each, own in zip(models, ranks, strict=True)]
    else:
        found = yield from _search(work, passes, models, ranks, sums, merged)
    return [
        measure.numbers(work.size - zero, known, magnitudes)
        for zero, known, magnitudes in zip(zeros, settings, found, strict=True)
    ]


def _zeros(model: SortedMagnitudes | Tally) -> int:
    tally = model if isinstance(model, Tally) else model.tally()
    return 0 if tally.numbers[0] else int(tally.counts[0])


def _search(
    work: Work,
    passes: Tallies,
    tallies: Sequence[Tally],
    ranks: Sequence[Sequence[int]],
    sums: bool,
    merged: Merged | None,
) -> Generator[Pass, list[Any], list[Found]]:
    """Find the magnitudes at these ranks: bins that contain any are tallied again, until they hold one magnitude."""
    encoding = FLOAT_ENCODINGS[work.compute]
    searches = [[RankSearch(tally, rank, sums) for rank in own] for tally, own in zip(tallies, ranks, strict=True)]
    units = [tally.units(0) if sums else None for tally in tallies]
    while pending := [[each for each in own if each.value is None] for own in searches]:
        if not any(pending):
            break
        # Bins that contain several ranks are tallied once.
        prefixes = [np.unique(np.array([each.prefix for each in own], np.uint64)) for own in pending]
        parent_shift = next(each.parent_shift for own in pending for each in own)
        tables = yield from _tally_within(work, passes, prefixes, parent_shift, DIGIT_BITS, merged)
        parts = np.split(tables, np.cumsum([len(own) for own in prefixes[:-1]]))
        for own, known, part in zip(pending, prefixes, parts, strict=True):
            for search in own:
                table = part[np.searchsorted(known, np.uint64(search.prefix))]
                digits = np.flatnonzero(table[:, 0])
                first = first_within(np.array(search.prefix, np.uint64), parent_shift, DIGIT_BITS)
                bins = first + digits.astype(np.uint64)
                search.narrow(Tally(encoding, max(parent_shift - DIGIT_BITS, 0), bins, table[digits]))
    return [Found(encoding, own, own_units) for own, own_units in zip(searches, units, strict=True)]


def ranked_lines(work: Work, measure: LineRanks) -> Lines:
    """The lines in which magnitudes are ranked."""
    return Lines.along(work.shape, work.size, measure.axis(len(work.shape) or 1))


def _measure_lines(work: Work, passes: ElementPasses, measure: LineRanks) -> Passes:
    """The probability of keeping each element, by its magnitude's rank within its line."""
    lines = ranked_lines(work, measure)
    found = yield passes.fragments(work, lines)
    settings = [work.method.of(model) for model in range(work.models)]
    probabilities = [lambda ranks, length, own=own: measure.probability(ranks, length, own) for own in settings]
    return LineKeep(lines, probabilities, work.compute, [each for span in found for each in span])


def _measure_ranks(work: Work, passes: Tallies, measure: Ranks) -> Passes:
    """The probability of keeping each element, by its magnitude's rank."""
    gathered = (yield from _gather(work, passes)) if work.size <= MOST else []
    every = [work.method.of(model) for model in range(work.models)]
    if gathered and all(shares_no_ranks(work.size, measure.spread(settings)) for settings in every):
        exact = [
            measure.probability(each.ranks(), work.size, settings) if each.active else np.ones(work.size)
            for each, settings in zip(gathered, every, strict=True)
        ]
        return KeepTables([], np.ones((0, RANKS)), 0, np.stack(exact))
    models = []
    tallies = [each.tally() for each in gathered] or (yield from _tally_all(work, passes, None))
    for tally, settings in zip(tallies, every, strict=True):

        def probability(ranks: Any, size: int, settings: Any = settings) -> Any:
            return measure.probability(ranks, size, settings)

        models.append(RankTable(tally, probability, measure.spread(settings)))
    shift, levels = FLOAT_ENCODINGS[work.compute].shift, 0
    while sum(map(len, prefixes := [model.prefixes for model in models])):
        if gathered:
            within = [each.within(own, shift) for each, own in zip(gathered, prefixes, strict=True)]
            tables = np.concatenate(within)
        else:
            tables = yield from _tally_within(work, passes, prefixes, shift, RANK_BITS, None)
        parts = np.split(tables, np.cumsum([len(own) for own in prefixes[:-1]]))
        for one, part in zip(models, parts, strict=True):
            one.narrow(part, shift)
        shift, levels = max(shift - RANK_BITS, 0), levels + 1
    found: list[tuple[Array, Array]] = []
    subtables: list[Array] = []
    for one in models:
        slots = sum(map(len, subtables))
        bins, keeps = one.table(slots)
        found.append((bins, keeps if one.active else np.ones_like(keeps)))  # A tensor of zeros is kept.
        subtables.append(one.subtables(slots))
    return KeepTables(found, np.concatenate(subtables), levels)


def _gather(work: Work, passes: Tallies) -> Passes:
    encoding = FLOAT_ENCODINGS[work.compute]
    (bits,) = yield passes.gather(work)
    return [SortedMagnitudes(encoding, each) for each in bits]


def _tally_all(work: Work, passes: Tallies, merged: Merged | None) -> Passes:
    encoding, pass_ = FLOAT_ENCODINGS[work.compute], passes.all(work, merged)
    spans = yield pass_
    return [Tally(encoding, encoding.shift, numbers, rows, sticky=True) for numbers, rows in reduce(pass_.fold, spans)]


def _tally_within(
    work: Work, passes: Tallies, prefixes: list[Array], parent_shift: int, digit_bits: int, merged: Merged | None
) -> Passes:
    pass_ = passes.within(work, prefixes, parent_shift, max(parent_shift - digit_bits, 0), digit_bits, merged)
    return reduce(pass_.fold, (yield pass_))


def add_up(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Add up bins and rows of blocks or spans: numbers, shape (bins,), ascending, and rows, shape (bins, sums)."""
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
    """The same for two spans, model by model."""
    return [add_up(pair) for pair in zip(one, other, strict=True)]
