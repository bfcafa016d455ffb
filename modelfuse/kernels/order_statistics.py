"""Exact order statistics and sums of magnitudes, by radix histograms (tallies) of their bits.

The bit pattern of a non-negative float, read as an integer, sorts like the float. A tally counts magnitudes by their
leading bits and sums the remaining bits; bins that matter are tallied again by the next digits. All sums are integers,
so slicing and the number of workers do not change a result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from msgspec import Struct

Counts = np.ndarray[Any, np.dtype[np.uint64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Booleans = np.ndarray[Any, np.dtype[np.bool_]]
Indices = np.ndarray[Any, np.dtype[np.intp]]

#: Magnitudes are tallied by 15 leading bits (exponent and first mantissa bits) and, in front of them, a sticky bit:
#: whether any remaining bit is set. Differences of bfloat16 models rarely have any, so nearly all of their bins hold
#: one value, and the bins that are used are adjacent and stay in the L1 cache.
LEAD_BITS = 15
LEADS = 1 << LEAD_BITS
BINS = 2 * LEADS
#: Bits per round when the bin that contains a threshold is tallied again.
DIGIT_BITS = 16
#: Bits per round when bins with too many ranks are tallied again: few, as there may be thousands of such bins.
RANK_BITS = 6
RANKS = 1 << RANK_BITS
#: Largest allowed error of a probability; the actual one is half of it, as a bin takes its mean rank.
PROBABILITY_ERROR = 1e-4
LOW_BITS = 22
HALF_BITS = 24


class FloatEncoding(Struct, frozen=True):
    """The binary encoding of a float type.

    Attributes:
        dtype: float32 or float64.
        mantissa: Stored mantissa bits.
        least: The smallest subnormal is 2 to the power of minus this.
        shift: Bits below those that the first tally's bins are made of.
        infinite: The exponent field of infinities and NaN.
    """

    dtype: str
    mantissa: int
    least: int
    shift: int
    infinite: int

    def value(self, bits: int) -> float:
        """The float with these bits."""
        return float(np.array(bits, dtype=self.dtype.replace("float", "uint")).view(self.dtype))

    def amount(self, units: int) -> float:
        """The float value of ``units`` smallest subnormals, rounded once."""
        try:
            return units / (1 << self.least)
        except OverflowError:
            return math.inf


_ENCODINGS = FloatEncoding("float32", 23, 149, 16, 255), FloatEncoding("float64", 52, 1074, 48, 2047)
FLOAT_ENCODINGS = {each.dtype: each for each in _ENCODINGS}


class Tally(Struct, frozen=True):
    """A histogram of magnitudes by their leading bits: the non-empty bins, ascending.

    Attributes:
        encoding: The float encoding of the bits.
        shift: The number of bits below the leading ones.
        numbers: uint64, shape (bins,): the leading bits, followed by the sticky bit if there is one.
        table: uint64, shape (bins, 3): counts, and the sums of the low 22 remaining bits and of the others; or only
            counts, shape (bins, 1), with a sticky bit and without sums.
        sticky: Whether bin numbers end with a sticky bit: whether any remaining bit is set.
    """

    encoding: FloatEncoding
    shift: int
    numbers: Counts
    table: Counts
    sticky: bool = False

    @property
    def counts(self) -> Counts:
        """The number of magnitudes in each bin: uint64, shape (bins,)."""
        return self.table[:, 0]

    def leading(self, index: int) -> int:
        """The leading bits of a bin."""
        return int(self.numbers[index]) >> self.sticky

    @property
    def mixed(self) -> Booleans:
        """Whether a bin may have different magnitudes, as some remaining bits are set: bool, shape (bins,)."""
        return np.asarray(self.numbers & np.uint64(1) if self.sticky else self.table[:, 1:].any(axis=1), bool)

    def find(self, rank: int) -> tuple[int, int]:
        """The bin of an ascending rank, and the rank among the magnitudes that share its leading bits.

        These include the smaller ones in the bin without the sticky bit.
        """
        below = np.cumsum(self.counts)
        index = int(np.searchsorted(below, np.uint64(rank), side="right"))
        start = index
        while start and self.leading(start - 1) == self.leading(index):
            start -= 1
        return index, rank - (int(below[start - 1]) if start else 0)

    def units(self, start: int, stop: int | None = None) -> int | None:
        """The exact sum of the magnitudes in bins ``start`` to ``stop``, in smallest subnormals.

        None if any is not finite.
        """
        stop = self.numbers.size if stop is None else stop
        if start == stop:
            return 0
        if self.leading(stop - 1) >> self.encoding.mantissa - self.shift == self.encoding.infinite:
            return None
        return _add_up(
            self.numbers[start:stop] >> np.uint64(self.sticky), self.table[start:stop], self.encoding, self.shift
        )


def _add_up(leading: Counts, table: Counts, encoding: FloatEncoding, shift: int) -> int:
    """The sum of the magnitudes in some bins, in smallest subnormals.

    Magnitudes of one exponent are summed first, split in halves so that the sums fit in 64 bits.
    """
    width, half = np.uint64(encoding.mantissa - shift), np.uint64((1 << HALF_BITS) - 1)
    exponents = leading >> width
    hidden = np.uint64(1) << width
    values = (leading & (hidden - np.uint64(1))) | np.where(exponents > 0, hidden, np.uint64(0))
    counts = table[:, 0]
    begins = np.flatnonzero(np.concatenate([[True], exponents[1:] != exponents[:-1]]))
    parts = (counts * (values & half), counts * (values >> np.uint64(HALF_BITS)), table[:, 1], table[:, 2])
    sums = [np.add.reduceat(part, begins).tolist() for part in parts]
    result = 0
    for exponent, low, high, rest, more in zip(exponents[begins].tolist(), *sums, strict=True):
        whole = (low + (high << HALF_BITS) << shift) + rest + (more << LOW_BITS)
        result += whole << max(exponent - 1, 0)
    return result


def first_within(prefixes: Counts, parent_shift: int, digit_bits: int) -> Counts:
    """The number of the first bin by the next digit below each prefix; the last digits begin with a prefix's end."""
    below, digit = np.uint64(min(parent_shift, digit_bits)), np.uint64(digit_bits)
    return prefixes << below >> digit << digit


class RankSearch:
    """The search for the magnitude at one rank: which bin to tally next, until the magnitude is found.

    Args:
        tally: The tally of all the model's magnitudes.
        rank: Ascending, from 0.

    Attributes:
        value: The magnitude, once it is found.
        above: The sum of all larger magnitudes, in smallest subnormals; None if any is not finite.
        own: The sum of the magnitudes equal to it, in smallest subnormals.
        prefix: The leading bits of the bin to tally next.
        parent_shift: The number of bits below the prefix.
    """

    def __init__(self, tally: Tally, rank: int, sums: bool) -> None:
        self._encoding, self._rank, self._sums = tally.encoding, rank, sums
        self.value: float | None = None
        self.above: int | None = 0
        self.own: int | None = 0
        self.narrow(tally)

    def narrow(self, tally: Tally) -> None:
        """Continue with the tally of the magnitudes whose leading bits are ``prefix``."""
        index, self._rank = tally.find(self._rank)
        self.prefix, self.parent_shift = tally.leading(index), tally.shift
        if not tally.mixed[index]:
            self.value = self._encoding.value(self.prefix << tally.shift)
        if not self._sums:
            return
        units = tally.units(index + 1)
        self.above = None if units is None or self.above is None else self.above + units
        if self.value is not None:
            self.own = tally.units(index, index + 1)


class Found:
    """The results of searches in one model's magnitudes, as :class:`modelfuse.methods.spec.Magnitudes`.

    Args:
        encoding: The float encoding of the bits.
        searches: One finished search per rank.
        units: The sum of all magnitudes in smallest subnormals; None if any is not finite.
    """

    def __init__(self, encoding: FloatEncoding, searches: Sequence[RankSearch], units: int | None) -> None:
        self._encoding, self._searches, self._units = encoding, searches, units

    @property
    def total(self) -> float:
        """The sum of all magnitudes; NaN if any is not finite."""
        return math.nan if self._units is None else self._encoding.amount(self._units)

    def at(self, number: int) -> float:
        """The magnitude at the ``number``-th requested rank."""
        return self._searches[number].value or 0.0

    def between(self, first: int, last: int | None = None) -> float:
        """The sum of the magnitudes from one requested rank to another, or to the largest; NaN if any is not finite."""
        low = self._searches[first]
        above = 0 if last is None else self._searches[last].above
        if low.above is None or low.own is None or above is None:
            return math.nan
        return self._encoding.amount(max(low.above + low.own - above, 0))


def _most_in_a_bin(size: int, spread: float) -> float:
    """The most magnitudes of a bin that may share a probability; the rank of a single magnitude is exact."""
    return max(PROBABILITY_ERROR * size / spread, 1.0) if spread else math.inf


def shares_no_ranks(size: int, spread: float) -> bool:
    """Whether a tensor is so small that no two different magnitudes share a rank."""
    return _most_in_a_bin(size, spread) == 1.0


class Crowded(NamedTuple):
    """Bins with too many ranks, ascending.

    Attributes:
        prefixes: uint64, shape (bins,): the leading bits of their magnitudes.
        larger: float64, shape (bins,): the number of larger magnitudes.
        apart: uint64, shape (bins,): the number of magnitudes with the same leading bits, but without the sticky bit.
    """

    prefixes: Counts
    larger: Floats
    apart: Counts


class RankTable:
    """One model's probabilities of being kept, by magnitude; bins with too many ranks are tallied again.

    Args:
        tally: The tally of all the model's magnitudes.
        probability: Maps ranks (0 is the largest magnitude) and the tensor's size to probabilities; linear in the rank.
        spread: The difference between the probabilities of the largest and the smallest magnitude.
    """

    def __init__(self, tally: Tally, probability: Callable[[Floats, int], Floats], spread: float) -> None:
        self._probability, self._spread = probability, spread
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
        """Continue with the tallies of the magnitudes with the leading bits ``prefixes``.

        Args:
            tables: uint64, shape (bins, digits, 3).
            parent_shift: The number of bits below a prefix.
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
        """The non-empty bins and their probabilities; −(slot + 1) is a subtable, after ``slots`` earlier ones."""
        return self._numbers, np.where(self._keeps < 0, self._keeps - slots, self._keeps)

    def subtables(self, slots: int) -> Floats:
        """Probabilities by digit, for each bin that was tallied again, shape (bins, digits)."""
        return np.where(self._subtables < 0, self._subtables - slots, self._subtables)

    def _keep(self, counts: Counts, larger: Floats, mixed: Booleans, slots: int) -> tuple[Floats, Indices]:
        """Probabilities by bin, and the indices of the bins with too many ranks, each of which gets a subtable."""
        ranks = larger + (counts.astype(np.float64) - 1) / 2
        keeps = np.asarray(self._probability(ranks, self._size), np.float64)
        index = np.flatnonzero((counts > _most_in_a_bin(self._size, self._spread)) & mixed)
        keeps[index] = -1.0 - slots - np.arange(index.size)
        return keeps, index
