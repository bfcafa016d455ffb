"""Mark which elements of a line are kept by their magnitudes' ranks.

An element is kept if its draw is below a probability that grows with its rank. Most draws lie below or above the
probabilities of all ranks that are possible for an element: a histogram of the line's magnitudes by their leading bits
tells the first and the last rank of its bin. Only for the rest, a few in a thousand, ranks are counted exactly. Where
there are more of them, as many magnitudes are nearly equal, the line is sorted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from modelfuse.kernels.compiled.merge_loops import draw_of
from modelfuse.kernels.jit.compile import compile_kernel
from modelfuse.kernels.line_marks import WINDOW

Array = np.ndarray[Any, Any]

#: Bins of a line's magnitudes: their leading bits, and whether any of the rest is set.
BINS = 1 << 16
#: Lines of up to so many elements are not tallied: each rank is counted.
SHORT = 32
#: The most ranks of a line that are counted one by one; if more are unknown, its magnitudes are sorted.
COUNTED = 64
#: Bits per round of sorting.
DIGIT = 8
#: The state of an element whose draw is not below the probability of its bin's first rank, but below that of the last.
UNKNOWN = 2


class LaidOutLines(NamedTuple):
    """Lines and their probabilities, laid out.

    Attributes:
        length: Elements per line.
        inner: The number of interleaving lines.
        shift: The number of bits of a magnitude below those that bins are made of.
        infinite: The bits of infinity: those of NaN are greater.
        streams: uint64, shape (models,): keys of the random streams.
        keeps: float32, shape (models, 2 · length − 1): the probability of being kept, by twice the mean rank.
        shares: uint16, shape (models, 2 · length + 3): the same from the third column on, as multiples of 2⁻¹⁶, rounded
            down; the two columns before and after them are those of empty bins.
        grows: bool, shape (models,): whether probabilities never fall with the rank.
        cut: int64, shape (groups,): the numbers of the groups of lines that slices cut, ascending.
        cut_keeps: float32, shape (models, groups · elements of a group): the probabilities of their elements.
    """

    length: int
    inner: int
    shift: int
    infinite: int
    streams: Array
    keeps: Array
    shares: Array
    grows: Array
    cut: Array
    cut_keeps: Array


class LineBuffers(NamedTuple):
    """A worker's buffers for ranking lines; ``unsigned`` are the bits of the compute type.

    Attributes:
        keys: Unsigned, shape (models, elements of a window): magnitudes as integers; NaN by position.
        sorted: Unsigned, shape (2, length): for sorting.
        line: Unsigned, shape (length,): the keys of one of several interleaving lines.
        line_draws: uint32, shape (length,): its random bits.
        random: uint64, shape (words,): random bits of a window of one model.
        draws: uint32: the same memory.
        bins: uint16, shape (length,).
        found: uint32, shape (length,): the bounds of each element's bin.
        counts: uint32, shape (BINS,): zero between lines.
        bounds: uint32, shape (BINS,): the probabilities of a bin's first and last rank as multiples of 2⁻¹⁶, rounded
            down, in the low and the high half.
        states: uint8, shape (length,), rounded up to words: whether elements are kept.
        states_words: uint64: the same memory.
        unknown: int32, shape (length + 8,): indices of the elements whose rank must be known.
        twice: int32, shape (COUNTED,): twice their mean ranks.
        bad: int64, shape (sources + 1,): counts that are put back, as elements are decoded twice.
    """

    keys: Array
    sorted: Array
    line: Array
    line_draws: Array
    random: Array
    draws: Array
    bins: Array
    found: Array
    counts: Array
    bounds: Array
    states: Array
    states_words: Array
    unknown: Array
    twice: Array
    bad: Array

    @classmethod
    def of(cls, models: int, sources: int, compute: str, length: int, group: int) -> LineBuffers:
        """Allocate them for groups of ``group`` elements, whose lines have ``length``."""
        window, unsigned = max(WINDOW, group), compute.replace("float", "uint")
        random, states = np.empty(window // 2 + 2, np.uint64), np.empty(length // 8 + 1, np.uint64)
        return cls(
            np.empty((models, window), unsigned),
            np.empty((2, length), unsigned),
            np.empty(length, unsigned),
            np.empty(length, np.uint32),
            random,
            random.view(np.uint32),
            np.empty(length, np.uint16),
            np.empty(length, np.uint32),
            np.zeros(BINS, np.uint32),
            np.empty(BINS, np.uint32),
            states.view(np.uint8),
            states,
            np.empty(length + 8, np.int32),
            np.empty(COUNTED, np.int32),
            np.zeros(sources + 1, np.int64),
        )


@compile_kernel
def mark_line(keys: Array, draws: Array, model: int, lines: LaidOutLines, own: LineBuffers) -> None:
    """Store the states of a line's elements; the lowest bit says whether an element is kept."""
    length, kind = lines.length, keys.dtype.type
    largest = kind(0)
    for i in range(length):
        largest = max(largest, keys[i])
    if largest > kind(lines.infinite):
        nans = 0
        for i in range(length):
            if keys[i] > kind(lines.infinite):
                nans += 1
                keys[i] = kind(lines.infinite + nans)
        largest = kind(lines.infinite + nans)
    if length > SHORT and lines.grows[model]:
        unknown = _mark_by_bins(keys, draws, largest, lines.shares[model], lines, own)
    else:
        unknown = length
        for i in range(length):
            own.unknown[i] = i
    _mark_unknown(keys, draws, unknown, lines.keeps[model], lines, own)


@compile_kernel
def _mark_by_bins(keys: Array, draws: Array, largest: Any, shares: Array, lines: LaidOutLines, own: LineBuffers) -> int:
    """Store states as far as they follow from bins; returns the number of elements for which they do not."""
    length, kind, shift = lines.length, keys.dtype.type, lines.shift
    bins, counts, bounds, found, states = own.bins, own.counts, own.bounds, own.found, own.states
    smallest, rest = largest, kind((1 << shift) - 1)
    for i in range(length):
        smallest = min(smallest, keys[i] if keys[i] > 0 else largest)
    for i in range(length):
        bins[i] = np.uint16((keys[i] >> kind(shift)) << kind(1)) | np.uint16((keys[i] & rest) != 0)
    for i in range(length):
        counts[bins[i]] += np.uint32(1)
    first = _bound(0, 0, shares, counts, bounds)
    for lead in range(max(int(smallest >> kind(shift)), 1), int(largest >> kind(shift)) + 1):
        first = _bound(lead, first, shares, counts, bounds)
    for i in range(length):
        found[i] = bounds[bins[i]]
    for i in range(length):
        draw = draws[i] >> np.uint32(16)
        below, upto = draw < (found[i] & np.uint32(0xFFFF)), draw <= (found[i] >> np.uint32(16))
        states[i] = np.uint8(below) | np.uint8(np.uint8(upto) << np.uint8(1))
    for i in range(length, length // 8 * 8 + 8):
        states[i] = 0
    return _find_unknown(length, own)


@compile_kernel
def _bound(lead: int, first: int, shares: Array, counts: Array, bounds: Array) -> int:
    """Store the bounds of two bins, of ranks from ``first`` on; returns the first rank beyond them."""
    exact, rest = 2 * lead, 2 * lead + 1
    middle = first + np.int64(counts[exact])
    last = middle + np.int64(counts[rest])
    # All magnitudes of the first bin are equal. Of empty bins, what is stored is not used.
    bounds[exact] = np.uint32(shares[first + middle + 1]) * np.uint32(0x10001)
    bounds[rest] = np.uint32(shares[2 * middle + 2]) | np.uint32(shares[2 * last]) << np.uint32(16)
    counts[exact], counts[rest] = 0, 0
    return int(last)


@compile_kernel
def _find_unknown(length: int, own: LineBuffers) -> int:
    """List the elements of unknown state, eight states at a time."""
    states, words, listed, unknown = own.states, own.states_words, own.unknown, 0
    for word in range(length // 8 + 1):
        if (words[word] & ~(words[word] << np.uint64(1)) & np.uint64(0x0202020202020202)) != 0:
            for i in range(word * 8, word * 8 + 8):
                listed[unknown] = i
                unknown += states[i] == UNKNOWN
    return unknown


@compile_kernel
def _mark_unknown(keys: Array, draws: Array, unknown: int, keeps: Array, lines: LaidOutLines, own: LineBuffers) -> None:
    """Store the states of the listed elements, by their ranks."""
    length, listed, twice, row = lines.length, own.unknown, own.twice, -1
    if unknown > COUNTED and length > SHORT:
        row = _sort(keys, length, own)
    for number in range(unknown):
        i = listed[number]
        if row >= 0:
            ascending = own.sorted[row]
            rank = _first(ascending, length, keys[i]) + _first(ascending, length, keys[i] + keys.dtype.type(1)) - 1
        else:
            rank = -1
            for other in range(number):
                if keys[listed[other]] == keys[i]:
                    rank = int(twice[other])
            if rank < 0:
                rank = _count(keys, length, keys[i])
            twice[number] = rank
        own.states[i] = draw_of(draws[i]) < keeps[rank]


@compile_kernel
def _count(keys: Array, length: int, key: Any) -> int:
    """Twice the mean rank of a key, by comparing it with all."""
    less, upto = np.uint32(0), np.uint32(0)
    for i in range(length):
        less = np.uint32(less + np.uint32(keys[i] < key))
        upto = np.uint32(upto + np.uint32(keys[i] <= key))
    return int(less) + int(upto) - 1


@compile_kernel
def _first(ascending: Array, length: int, key: Any) -> int:
    """The number of sorted keys that are less than a key."""
    low, high = 0, length
    while low < high:
        middle = (low + high) // 2
        if ascending[middle] < key:
            low = middle + 1
        else:
            high = middle
    return low


@compile_kernel
def _sort(keys: Array, length: int, own: LineBuffers) -> int:
    """Sort keys, from the last digit on; returns the row of ``own.sorted`` that has them."""
    counts, row, kind = own.counts, 0, keys.dtype.type
    for i in range(length):
        own.sorted[0, i] = keys[i]
    for shift in range(0, 8 * keys.itemsize, DIGIT):
        here, there = own.sorted[row], own.sorted[1 - row]
        for i in range(length):
            counts[np.int64((here[i] >> kind(shift)) & kind(0xFF))] += np.uint32(1)
        begin = np.uint32(0)
        for digit in range(1 << DIGIT):
            own_count = counts[digit]
            counts[digit] = begin
            begin += own_count
        for i in range(length):
            own_digit = np.int64((here[i] >> kind(shift)) & kind(0xFF))
            there[counts[own_digit]] = here[i]
            counts[own_digit] += np.uint32(1)
        for digit in range(1 << DIGIT):
            counts[digit] = 0
        row = 1 - row
    return row
