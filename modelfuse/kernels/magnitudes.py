"""Order statistics and sums of magnitudes, exact, from tallies of their bits.

The bits of a non-negative float, read as an integer, sort as the float does. A tally counts them by
their leading bits, together with the sum of the bits that remain; a bin that matters is tallied
again by its next digits. All sums are integers, so neither slices nor workers change a result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelfuse.methods.magprune import keep_probability
from modelfuse.methods.trim import kept_from, scale

Counts = np.ndarray[Any, np.dtype[np.uint64]]

#: A probability may be off by this much at most (half of it, as a bin takes its mean rank).
PROBABILITY_ERROR = 1e-4
DIGIT_BITS = 12
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

    def value(self, bits: int) -> float:
        """The float with these bits."""
        return float(np.array(bits, dtype=self.dtype.replace("float", "uint")).view(self.dtype))

    def amount(self, units: int) -> float:
        """So many smallest subnormals as a float, rounded once."""
        try:
            return units / (1 << self.least)
        except OverflowError:
            return math.inf


LAYOUTS = {"float32": Layout("float32", 23, 149, 12, 255), "float64": Layout("float64", 52, 1074, 44, 2047)}


@dataclass(frozen=True, slots=True)
class Tally:
    """Magnitudes counted by their leading bits: the bins that hold any, ascending.

    Attributes:
        layout: How to read the bits.
        shift: The number of bits that remain after the leading ones.
        numbers: uint64, shape (bins,): the leading bits, followed by the sticky bit if there is one.
        table: uint64, shape (bins, 3): counts, and the sums of the remaining bits' low 22 and of the others.
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

    def is_single(self, index: int) -> bool:
        """Whether all magnitudes in a bin are known to be equal: no bits remain, or none is set."""
        return self.shift == 0 or not self.table[index, 1:].any()

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
        numbers, rows = self.numbers[start:stop], self.table[start:stop]
        if not numbers.size:
            return 0
        leading = numbers >> np.uint64(self.sticky)
        width = np.uint64(self.layout.mantissa - self.shift)
        exponents = leading >> width
        if int(exponents[-1]) == self.layout.infinite:
            return None
        hidden = np.where(exponents > 0, np.uint64(1) << width, np.uint64(0))
        mantissas = (leading & ((np.uint64(1) << width) - np.uint64(1))) | hidden
        # Split in halves, so that 64 bits hold the sums; those of one exponent are added up at a time.
        low, high = mantissas & np.uint64((1 << HALF_BITS) - 1), mantissas >> np.uint64(HALF_BITS)
        parts = np.stack([rows[:, 0] * low, rows[:, 0] * high, rows[:, 1], rows[:, 2]], axis=1)
        starts = np.flatnonzero(np.diff(exponents, prepend=exponents[:1] + np.uint64(1)))
        total = 0
        for exponent, sums in zip(exponents[starts].tolist(), np.add.reduceat(parts, starts).tolist(), strict=True):
            units = (sums[0] + (sums[1] << HALF_BITS) << self.shift) + sums[2] + (sums[3] << LOW_BITS)
            total += units << max(exponent - 1, 0)
        return total


class TrimSearch:
    """The search for one model's trim threshold: which bin to tally next, until it is known.

    Args:
        tally: The tally of all the model's magnitudes.
        reserve_p: The share of elements to keep.
    """

    def __init__(self, tally: Tally, reserve_p: float) -> None:
        self._layout = tally.layout
        self._all = tally.units(0)
        self._kept: int | None = 0
        self._rank = kept_from(int(tally.counts.sum()), reserve_p)
        self.threshold: float | None = None
        self.narrow(tally)

    def narrow(self, tally: Tally) -> None:
        """Go on with the tally of the magnitudes whose leading bits are ``prefix``."""
        index, self._rank = tally.find(self._rank)
        self.prefix, self.parent_shift = tally.leading(index), tally.shift
        single = tally.is_single(index)
        units = tally.units(index if single else index + 1)
        self._kept = None if units is None or self._kept is None else self._kept + units
        if single:
            self.threshold = self._layout.value(self.prefix << tally.shift)

    def factor(self) -> float:
        """The factor that restores the sum of magnitudes."""
        if self._all is None or self._kept is None:
            return 1.0
        return scale(self._layout.amount(self._all), self._layout.amount(self._kept))


class RankTable:
    """One model's probabilities of being kept, by magnitude; bins too full for their width are tallied again.

    Args:
        tally: The tally of all the model's magnitudes.
        reserve_p: As in magprune.
        epsilon: As in magprune.
    """

    def __init__(self, tally: Tally, reserve_p: float, epsilon: float) -> None:
        self._tally, self._reserve_p, self._epsilon = tally, reserve_p, epsilon
        self._size = int(tally.counts.sum())
        self._larger = self._size - np.cumsum(tally.counts).astype(np.float64)
        self.active = bool(tally.numbers[-1])
        heavy = tally.counts.astype(np.float64) * epsilon > PROBABILITY_ERROR * self._size
        self._heavy = np.flatnonzero(heavy & tally.table[:, 1:].any(axis=1))
        #: The number of the bin after the table's first entry, which is for zeros.
        self.first_bin = max(int(tally.numbers[1 if tally.numbers.size > 1 and not tally.numbers[0] else 0]), 1)

    def prefixes(self) -> list[int]:
        """The leading bits to tally again, ascending."""
        return [self._tally.leading(int(index)) for index in self._heavy]

    def table(self, first_slot: int) -> np.ndarray[Any, Any]:
        """Probabilities for zeros, then by bin; −(slot + 1) where a subtable says more."""
        keep = self._keep(self._larger, self._tally.counts)
        keep[self._heavy] = -1.0 - first_slot - np.arange(self._heavy.size)
        numbers = self._tally.numbers.astype(np.int64)
        table = np.ones(max(int(numbers[-1]) - self.first_bin, 0) + 2)
        table[np.maximum(numbers - self.first_bin + 1, 0)] = keep
        return table

    def subtables(self, tallies: list[Tally]) -> list[np.ndarray[Any, Any]]:
        """Probabilities by digit for each bin that was tallied again."""
        tables = []
        for index, tally in zip(self._heavy, tallies, strict=True):
            larger = self._larger[index] + tally.counts.sum() - np.cumsum(tally.counts)
            table = np.ones(1 << DIGIT_BITS)
            table[tally.numbers & np.uint64((1 << DIGIT_BITS) - 1)] = self._keep(larger, tally.counts)
            tables.append(table)
        return tables

    def _keep(self, larger: np.ndarray[Any, Any], counts: Counts) -> np.ndarray[Any, Any]:
        ranks = larger + (counts.astype(np.float64) - 1) / 2
        return keep_probability(ranks, self._size, self._reserve_p, self._epsilon)
