"""Order statistics and sums of magnitudes, exact, from tallies of their bits.

The bits of a non-negative float, read as an integer, sort as the float does. A tally counts them by
their leading bits, together with the sum of the bits that remain; a bin that matters is tallied
again by its next digits. All sums are integers, so neither slices nor workers change a result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from modelfuse.kernels.compiled.merge_loops import RANK_BITS
from modelfuse.kernels.jit.compile import compile_kernel
from modelfuse.methods.magprune import keep_probability
from modelfuse.methods.trim import kept_from, scale

Counts = np.ndarray[Any, np.dtype[np.uint64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Booleans = np.ndarray[Any, np.dtype[np.bool_]]
Indices = np.ndarray[Any, np.dtype[np.intp]]

#: A probability may be off by this much at most (half of it, as a bin takes its mean rank).
PROBABILITY_ERROR = 1e-4
LOW_BITS = 22
HALF_BITS = 24


@dataclass(frozen=True, slots=True)
class Layout:
    """How a float's bits are read.

    Attributes:
        dtype: float32 or float64.
        mantissa: Stored mantissa bits.
        least: The power of two of the smallest subnormal, negated.
        shift: The bits that remain below a first tally's bins.
        infinite: The exponent bits of infinities and NaN.
    """

    dtype: str
    mantissa: int
    least: int
    shift: int
    infinite: int

    @property
    def words(self) -> int:
        """So many words of 64 bits hold any sum of magnitudes, in smallest subnormals."""
        return (self.infinite + self.mantissa >> 6) + 2

    def value(self, bits: int) -> float:
        """The float with these bits."""
        return float(np.array(bits, dtype=self.dtype.replace("float", "uint")).view(self.dtype))

    def amount(self, units: int) -> float:
        """So many smallest subnormals as a float, rounded once."""
        try:
            return units / (1 << self.least)
        except OverflowError:
            return math.inf


LAYOUTS = {"float32": Layout("float32", 23, 149, 16, 255), "float64": Layout("float64", 52, 1074, 48, 2047)}


@dataclass(frozen=True, slots=True)
class Tally:
    """Magnitudes counted by their leading bits: the bins that hold any, ascending.

    Attributes:
        layout: How to read the bits.
        shift: The number of bits that remain after the leading ones.
        numbers: uint64, shape (bins,): the leading bits, followed by the sticky bit if there is one.
        table: uint64, shape (bins, 3): counts, and the sums of the remaining bits' low 22 and of the others; or counts
            alone, shape (bins, 1), where there is a sticky bit and no sum is asked for.
        sticky: Whether a bin's number ends with a bit that says if any of the remaining bits is set.
    """

    layout: Layout
    shift: int
    numbers: Counts
    table: Counts
    sticky: bool = False

    @property
    def counts(self) -> Counts:
        """uint64, shape (bins,): how many magnitudes are in each bin."""
        return self.table[:, 0]

    def leading(self, index: int) -> int:
        """The leading bits of a bin."""
        return int(self.numbers[index]) >> self.sticky

    @property
    def mixed(self) -> Booleans:
        """bool, shape (bins,): which bins may hold different magnitudes, as some of the remaining bits are set."""
        return np.asarray(self.numbers & np.uint64(1) if self.sticky else self.table[:, 1:].any(axis=1), bool)

    def find(self, rank: int) -> tuple[int, int]:
        """The bin that holds this ascending rank, and the rank among those that share its leading bits.

        These include the smaller ones in the bin without sticky bit.
        """
        below = np.cumsum(self.counts)
        index = int(np.searchsorted(below, np.uint64(rank), side="right"))
        start = index
        while start and self.leading(start - 1) == self.leading(index):
            start -= 1
        return index, rank - (int(below[start - 1]) if start else 0)

    def units(self, start: int, stop: int | None = None) -> int | None:
        """The exact sum of the magnitudes in the bins ``start`` to ``stop``, in smallest subnormals.

        None if any is not finite.
        """
        stop = self.numbers.size if stop is None else stop
        if start == stop:
            return 0
        layout, words = self.layout, np.zeros(self.layout.words, np.uint64)
        if self.leading(stop - 1) >> layout.mantissa - self.shift == layout.infinite:
            return None
        _add_up(self.numbers, self.table, start, stop, self.sticky, layout.mantissa, self.shift, words)
        return int.from_bytes(words.astype("<u8").tobytes(), "little")


@compile_kernel
def _add_up(
    numbers: Counts, table: Counts, start: int, stop: int, sticky: bool, mantissa: int, shift: int, words: Counts
) -> None:
    """Add the magnitudes in some bins of a tally to an integer of many words, the lowest first.

    Those of one exponent are added up first: split in halves, so that 64 bits hold the sums.
    """
    low = high = rest = more = np.uint64(0)
    width, half = np.uint64(mantissa - shift), np.uint64((1 << HALF_BITS) - 1)
    hidden = np.uint64(1) << width
    for index in range(start, stop):
        leading = numbers[index] >> np.uint64(sticky)
        exponent: Any = np.int64(leading >> width)
        value = leading & (hidden - np.uint64(1))
        if exponent > 0:
            value |= hidden
        low += table[index, 0] * (value & half)
        high += table[index, 0] * (value >> np.uint64(HALF_BITS))
        rest += table[index, 1]
        more += table[index, 2]
        last = index + 1 == stop
        if last or np.int64(numbers[index + 1] >> np.uint64(sticky) >> width) != exponent:
            place = max(exponent - 1, 0)
            _add(words, low, place + shift)
            _add(words, high, place + shift + HALF_BITS)
            _add(words, rest, place)
            _add(words, more, place + LOW_BITS)
            low = high = rest = more = np.uint64(0)


@compile_kernel
def _add(words: Counts, value: Any, place: int) -> None:
    """Add ``value`` · 2^``place``."""
    word, bit = place >> 6, np.uint64(place & 63)
    # Shifted in two steps, as 64 bits at once are no shift.
    upper = value >> np.uint64(1) >> (np.uint64(63) - bit)
    value <<= bit
    words[word] += value
    if words[word] < value:
        upper += np.uint64(1)
    while upper != 0:
        word += 1
        words[word] += upper
        upper = np.uint64(words[word] < upper)


def first_within(prefixes: Counts, parent_shift: int, digit_bits: int) -> Counts:
    """The number of the first bin by the next digit below each prefix; the last digits begin with a prefix's end."""
    below, digit = np.uint64(min(parent_shift, digit_bits)), np.uint64(digit_bits)
    return prefixes << below >> digit << digit


class TrimSearch:
    """The search for one model's trim threshold: which bin to tally next, until it is known.

    Args:
        tally: The tally of all the model's magnitudes.
        reserve_p: The share of elements to keep.
    """

    def __init__(self, tally: Tally, reserve_p: float) -> None:
        self._layout = tally.layout
        self._kept: int | None = 0
        self._rank = kept_from(int(tally.counts.sum()), reserve_p)
        self.threshold: float | None = None
        dropped = tally.units(0, self.narrow(tally))
        self._all = None if dropped is None or self._kept is None else dropped + self._kept

    def narrow(self, tally: Tally) -> int:
        """Go on with the tally of the magnitudes whose leading bits are ``prefix``; returns the first bin that is kept.

        If that is not known yet, it is the first one above the bin to tally next.
        """
        index, self._rank = tally.find(self._rank)
        self.prefix, self.parent_shift = tally.leading(index), tally.shift
        if not tally.mixed[index]:
            self.threshold = self._layout.value(self.prefix << tally.shift)
        first = index if self.threshold is not None else index + 1
        units = tally.units(first)
        self._kept = None if units is None or self._kept is None else self._kept + units
        return first

    def factor(self) -> float:
        """The factor that restores the sum of magnitudes."""
        if self._all is None or self._kept is None:
            return 1.0
        return scale(self._layout.amount(self._all), self._layout.amount(self._kept))


class Crowded(NamedTuple):
    """Bins that hold too many ranks, ascending.

    Attributes:
        prefixes: uint64, shape (bins,): the leading bits of their magnitudes.
        larger: float64, shape (bins,): how many magnitudes are larger.
        apart: uint64, shape (bins,): how many share the leading bits but, as no bits remain, have their own bin.
    """

    prefixes: Counts
    larger: Floats
    apart: Counts


class RankTable:
    """One model's probabilities of being kept, by magnitude; bins that hold too many ranks are tallied again.

    Args:
        tally: The tally of all the model's magnitudes.
        reserve_p: As in magprune.
        epsilon: As in magprune.
    """

    def __init__(self, tally: Tally, reserve_p: float, epsilon: float) -> None:
        self._reserve_p, self._epsilon = reserve_p, epsilon
        self._size = int(tally.counts.sum())
        self._subtables = np.ones((0, 1 << RANK_BITS))
        self.active = bool(tally.numbers[-1])
        self._numbers, counts = tally.numbers, tally.counts
        larger = self._size - np.cumsum(counts).astype(np.float64)
        self._keeps, index = self._keep(counts, larger, tally.mixed, 0)
        leading = tally.numbers >> np.uint64(1)
        twins = (index > 0) & (leading[index] == leading[index - 1])
        self._crowded = Crowded(leading[index], larger[index], np.where(twins, counts[index - 1], np.uint64(0)))

    @property
    def prefixes(self) -> Counts:
        """The leading bits to tally again, ascending."""
        return self._crowded.prefixes

    def narrow(self, tables: Counts, parent_shift: int) -> None:
        """Go on with the tallies of the magnitudes with the leading bits ``prefixes``.

        Args:
            tables: uint64, shape (bins, digits, 3).
            parent_shift: The bits that remain below a prefix.
        """
        parents, slots = self._crowded, len(self._subtables) + len(tables)
        row, digit = np.nonzero(tables[:, :, 0])
        counts, *rests = tables[row, digit].T
        counts[digit == 0] -= parents.apart[row[digit == 0]]
        below = np.cumsum(counts)
        last = below[np.searchsorted(row, np.arange(len(tables)), side="right") - 1]
        larger = parents.larger[row] + (last[row] - below)
        keeps, index = self._keep(counts, larger, (rests[0] | rests[1]) > 0, slots)
        subtables = np.ones((len(tables), 1 << RANK_BITS))
        subtables[row, digit] = keeps
        self._subtables = np.concatenate([self._subtables, subtables])
        prefixes = first_within(parents.prefixes[row], parent_shift, RANK_BITS) + digit.astype(np.uint64)
        self._crowded = Crowded(prefixes[index], larger[index], np.zeros(index.size, np.uint64))

    def table(self, slots: int) -> tuple[Counts, Floats]:
        """The bins that hold any, and their probabilities; −(slot + 1) for a subtable, after ``slots`` of others."""
        return self._numbers, np.where(self._keeps < 0, self._keeps - slots, self._keeps)

    def subtables(self, slots: int) -> Floats:
        """The same by digit, for each bin that was tallied again, shape (bins, digits)."""
        return np.where(self._subtables < 0, self._subtables - slots, self._subtables)

    def _keep(self, counts: Counts, larger: Floats, mixed: Booleans, slots: int) -> tuple[Floats, Indices]:
        """Probabilities by bin, and which bins hold too many ranks: each is one more subtable."""
        ranks = larger + (counts.astype(np.float64) - 1) / 2
        keeps = np.asarray(keep_probability(ranks, self._size, self._reserve_p, self._epsilon), np.float64)
        # One magnitude's rank is exact.
        most = max(PROBABILITY_ERROR * self._size / self._epsilon, 1.0) if self._epsilon else math.inf
        index = np.flatnonzero((counts > most) & mixed)
        keeps[index] = -1.0 - slots - np.arange(index.size)
        return keeps, index
