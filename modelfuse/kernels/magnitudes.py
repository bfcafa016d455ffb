"""Order statistics and sums of magnitudes, exact, from tallies of their bits.

The bits of a non-negative float, read as an integer, sort as the float does. A tally counts them by
their leading bits, together with the sum of the bits that remain; a bin that matters is tallied
again by its next digits. All sums are integers, so neither slices nor workers change a result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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


@dataclass(frozen=True, slots=True)
class Layout:
    """How a float's bits are read.

    Attributes:
        dtype: float32 or float64.
        mantissa: Stored mantissa bits.
        least: The power of two of the smallest subnormal, negated.
        shift: The bits that remain below a first tally's bins.
    """

    dtype: str
    mantissa: int
    least: int
    shift: int

    def value(self, bits: int) -> float:
        """The float with these bits."""
        return float(np.array(bits, dtype=self.dtype.replace("float", "uint")).view(self.dtype))

    def amount(self, units: int) -> float:
        """So many smallest subnormals as a float, rounded once."""
        try:
            return units / (1 << self.least)
        except OverflowError:
            return math.inf


LAYOUTS = {"float32": Layout("float32", 23, 149, 12), "float64": Layout("float64", 52, 1074, 44)}


@dataclass(frozen=True, slots=True)
class Tally:
    """Magnitudes that share their leading bits, counted by the digits that follow.

    Attributes:
        layout: How to read the bits.
        prefix: The bits before the digit.
        first: The digit of the first bin.
        shift: The number of bits after the digit.
        table: uint64, shape (3, bins): counts, and the sums of the remaining bits' low 22 and of the others.
        prefix_bits: The digit's width.
    """

    layout: Layout
    prefix: int
    first: int
    shift: int
    table: Counts
    prefix_bits: int = DIGIT_BITS

    def bits(self, index: int) -> int:
        """The leading bits of a bin, up to and with its digit."""
        return (self.prefix << self.prefix_bits) + self.first + index

    def size(self) -> int:
        """How many magnitudes were tallied."""
        return int(self.table[0].sum())

    def is_single(self, index: int) -> bool:
        """Whether all magnitudes in a bin are known to be equal: no bits remain, or none is set."""
        return self.shift == 0 or not self.table[1:, index].any()

    def find(self, rank: int) -> tuple[int, int]:
        """The bin that holds the magnitude of this ascending rank, and the rank within it."""
        below = np.cumsum(self.table[0])
        index = int(np.searchsorted(below, np.uint64(rank), side="right"))
        return index, rank - (int(below[index - 1]) if index else 0)

    def units(self, start: int) -> int | None:
        """The exact sum of the magnitudes in the bins from ``start`` on, in smallest subnormals.

        None if any is not finite.
        """
        indices = start + np.flatnonzero(self.table[0, start:])
        if not indices.size:
            return 0
        leading = np.uint64(self.bits(0)) + indices.astype(np.uint64)
        width = np.uint64(self.layout.mantissa - self.shift)
        exponents = leading >> width
        if int(exponents[-1]) == (255 if self.layout.mantissa == 23 else 2047):
            return None
        hidden = np.where(exponents > 0, np.uint64(1) << width, np.uint64(0))
        mantissas = (leading & ((np.uint64(1) << width) - np.uint64(1))) | hidden
        total = 0
        for exponent in np.unique(exponents):
            here = exponents == exponent
            counts, low, high = self.table[:, indices[here]]
            units = _dot(counts, mantissas[here]) << self.shift
            units += int(low.sum()) + (int(high.sum()) << LOW_BITS)
            total += units << max(int(exponent) - 1, 0)
        return total


def _dot(counts: Counts, mantissas: Counts) -> int:
    """The exact product sum; the mantissas are split so that 64 bits are enough."""
    half = np.uint64(24)
    low = int((counts * (mantissas & ((np.uint64(1) << half) - np.uint64(1)))).sum())
    return low + (int((counts * (mantissas >> half)).sum()) << int(half))


class TrimSearch:
    """The search for one model's trim threshold: which bin to tally next, until it is known.

    Args:
        tally: The tally of all the model's magnitudes.
        reserve_p: The share of elements to keep.
    """

    def __init__(self, tally: Tally, reserve_p: float) -> None:
        self._all = tally.units(0)
        self._above: int | None = 0
        self._rank = kept_from(tally.size(), reserve_p)
        self.threshold: float | None = None
        self.prefix = 0
        self.parent_shift = 0
        self.narrow(tally)

    def narrow(self, tally: Tally) -> None:
        """Go on with the tally of the bin ``prefix``."""
        index, self._rank = tally.find(self._rank)
        self.prefix, self.parent_shift = tally.bits(index), tally.shift
        if tally.is_single(index):
            self._add(tally.units(index))
            self.threshold = tally.layout.value(self.prefix << tally.shift)
            self._layout = tally.layout
        else:
            self._add(tally.units(index + 1))

    def _add(self, units: int | None) -> None:
        self._above = None if units is None or self._above is None else self._above + units

    def factor(self) -> float:
        """The factor that restores the sum of magnitudes."""
        if self._all is None or self._above is None:
            return 1.0
        return scale(self._layout.amount(self._all), self._layout.amount(self._above))


class RankTable:
    """One model's probabilities of being kept, by magnitude; bins too full for their width are tallied again.

    Args:
        tally: The tally of all the model's magnitudes.
        reserve_p: As in magprune.
        epsilon: As in magprune.
    """

    def __init__(self, tally: Tally, reserve_p: float, epsilon: float) -> None:
        self._tally, self._reserve_p, self._epsilon = tally, reserve_p, epsilon
        self._size = tally.size()
        counts = tally.table[0]
        self._larger = self._size - np.cumsum(counts).astype(np.float64)
        self.active = bool(counts[1:].any() or tally.first > 0 or tally.table[1:].any())
        heavy = counts.astype(np.float64) * epsilon > PROBABILITY_ERROR * self._size
        self._heavy = np.flatnonzero(heavy & tally.table[1:].any(axis=0)) if self.active else np.array([], np.int64)

    @property
    def first_bin(self) -> int:
        """The leading bits of the table's first entry."""
        return self._tally.first

    def prefixes(self) -> Iterator[int]:
        """The bins to tally again, ascending."""
        return (self._tally.bits(int(index)) for index in self._heavy)

    def table(self, first_slot: int) -> np.ndarray[Any, Any]:
        """Probabilities by bin; −(slot + 1) where a subtable says more."""
        table = self._keep(self._larger, self._tally.table[0])
        table[self._heavy] = -1.0 - first_slot - np.arange(self._heavy.size)
        return table

    def subtables(self, tallies: list[Tally]) -> list[np.ndarray[Any, Any]]:
        """Probabilities by digit for each bin that was tallied again."""
        tables = []
        for index, tally in zip(self._heavy, tallies, strict=True):
            counts = tally.table[0]
            larger = self._larger[index] + counts.sum() - np.cumsum(counts)
            tables.append(self._keep(larger, counts))
        return tables

    def _keep(self, larger: np.ndarray[Any, Any], counts: Counts) -> np.ndarray[Any, Any]:
        ranks = larger + np.maximum(counts.astype(np.float64) - 1, 0) / 2
        return keep_probability(ranks, self._size, self._reserve_p, self._epsilon)
