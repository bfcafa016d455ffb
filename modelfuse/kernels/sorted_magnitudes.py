"""Order statistics, sums and ranks of small tensors, by sorting their magnitudes.

The results are bit-identical to those of :mod:`modelfuse.kernels.order_statistics`, which takes tensors of any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from modelfuse.kernels.order_statistics import HALF_BITS, RANK_BITS, FloatEncoding, Tally

Array = np.ndarray[Any, Any]

#: The largest tensor, in elements, whose magnitudes are sorted.
MOST = 1 << 14


class SortedMagnitudes:
    """The magnitudes of one model's tensor.

    Args:
        encoding: The float encoding of the bits.
        bits: uint32 or uint64, shape (elements,): the bits of the magnitudes, in the order of the elements.
    """

    def __init__(self, encoding: FloatEncoding, bits: Array) -> None:
        self._encoding, self._bits = encoding, bits

    @cached_property
    def _sorted(self) -> Array:
        return np.sort(self._bits)

    def at_ranks(self, ranks: Sequence[int]) -> FoundSorted:
        """The magnitudes at these ranks (ascending from 0), and sums between them."""
        return FoundSorted(self._encoding, self._sorted, ranks)

    def tally(self) -> Tally:
        """The tally by leading bits and sticky bit, as the tally pass would find it."""
        bits, shift = self._sorted, self._encoding.shift
        one = bits.dtype.type
        bins = (bits >> one(shift)) << one(1) | ((bits & one((1 << shift) - 1)) != 0)
        starts = np.flatnonzero(np.concatenate([[True], bins[1:] != bins[:-1]]))
        counts = np.diff(np.append(starts, bins.size)).astype(np.uint64)
        return Tally(self._encoding, shift, bins[starts].astype(np.uint64), counts[:, None], sticky=True)

    def within(self, prefixes: Array, parent_shift: int) -> Array:
        """The tally of some bins by the next RANK_BITS bits.

        Args:
            prefixes: uint64, ascending: the bins' leading bits.
            parent_shift: The number of bits below them.

        Returns:
            uint64, shape (bins, digits, 3): counts; the last two words are nonzero where any lower bit is set.
        """
        tables = np.zeros((len(prefixes), 1 << RANK_BITS, 3), np.uint64)
        if not len(prefixes):
            return tables
        bits, shift = self._sorted.astype(np.uint64), np.uint64(max(parent_shift - RANK_BITS, 0))
        leading = bits >> np.uint64(parent_shift)
        rows = np.minimum(np.searchsorted(prefixes, leading), len(prefixes) - 1)
        hits = prefixes[rows] == leading
        chosen = bits[hits]
        digits = ((chosen >> shift) & np.uint64((1 << RANK_BITS) - 1)).astype(np.int64)
        slots = (rows[hits] << RANK_BITS) + digits
        size = len(prefixes) << RANK_BITS
        tables[:, :, 0] = np.bincount(slots, minlength=size).reshape(len(prefixes), -1)
        rest = (chosen & ((np.uint64(1) << shift) - np.uint64(1))) != 0
        tables[:, :, 1] = np.bincount(slots, rest, size).reshape(len(prefixes), -1)
        return tables

    def ranks(self) -> Array:
        """Each element's rank, descending by magnitude from 0; equal magnitudes share their mean rank: float64."""
        order = np.argsort(self._bits, kind="stable")
        bits = self._bits[order]
        starts = np.flatnonzero(np.concatenate([[True], bits[1:] != bits[:-1]]))
        counts = np.diff(np.append(starts, bits.size))
        larger = bits.size - (starts + counts)
        ranks = np.empty(bits.size)
        ranks[order] = np.repeat(larger + (counts - 1) / 2, counts)
        return ranks

    @property
    def active(self) -> bool:
        """Whether any magnitude is nonzero."""
        return bool(self._bits.any())


class FoundSorted:
    """Order statistics of sorted magnitudes, as :class:`modelfuse.methods.spec.Magnitudes`.

    Args:
        encoding: The float encoding of the bits.
        bits: The bits of the magnitudes, ascending.
        ranks: The requested ranks.
    """

    def __init__(self, encoding: FloatEncoding, bits: Array, ranks: Sequence[int]) -> None:
        self._encoding, self._bits, self._ranks = encoding, bits, ranks

    @property
    def total(self) -> float:
        """The sum of all magnitudes; NaN if any is not finite."""
        return self._sum(0, self._bits.size)

    def at(self, number: int) -> float:
        """The magnitude at the ``number``-th requested rank."""
        return self._encoding.value(int(self._bits[self._ranks[number]]))

    def between(self, first: int, last: int | None = None) -> float:
        """The sum of the magnitudes from one requested rank to another, or to the largest; NaN if any is not finite."""
        return self._sum(self._edges[first][0], self._bits.size if last is None else self._edges[last][1])

    @cached_property
    def _edges(self) -> list[tuple[int, int]]:
        """For each requested rank, the range of ranks with the same magnitude."""
        values = [self._bits[rank] for rank in self._ranks]
        return [
            (int(np.searchsorted(self._bits, value)), int(np.searchsorted(self._bits, value, "right")))
            for value in values
        ]

    def _sum(self, start: int, end: int) -> float:
        units = self._units
        return math.nan if units is None else self._encoding.amount(max(units[end] - units[start], 0))

    @cached_property
    def _units(self) -> dict[int, int] | None:
        """The exact sum of all magnitudes below each edge, in smallest subnormals; None if any is not finite."""
        encoding, bits = self._encoding, self._bits.astype(np.uint64)
        exponents = bits >> np.uint64(encoding.mantissa)
        if exponents[-1] == encoding.infinite:
            return None
        hidden = np.uint64(1 << encoding.mantissa)
        values = (bits & (hidden - np.uint64(1))) | np.where(exponents > 0, hidden, np.uint64(0))
        edges = sorted({0, bits.size, *(edge for pair in self._edges for edge in pair)})
        begins = np.flatnonzero(exponents[1:] != exponents[:-1]) + 1
        begins = np.unique(np.concatenate([begins, edges[:-1]]))
        low = np.add.reduceat(values & np.uint64((1 << HALF_BITS) - 1), begins).tolist()
        high = np.add.reduceat(values >> np.uint64(HALF_BITS), begins).tolist()
        units, known = 0, dict[int, int]()
        for begin, exponent, one, more in zip(begins.tolist(), exponents[begins].tolist(), low, high, strict=True):
            known[begin] = units
            units += (one + (more << HALF_BITS)) << max(exponent - 1, 0)
        known[bits.size] = units
        return known
