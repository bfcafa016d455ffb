"""Arithmetic on tensors of any library, used to evaluate expressions.

Functions take blocks: one-dimensional tensors of the compute type, float32 or float64. No operation is fused (one
rounding each) and no sum depends on a library's order, so results are bit-identical on all devices.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from modelfuse.dtypes import F16, DType
from modelfuse.kernels.arrays.library import INTEGERS, Library, Tensor
from modelfuse.kernels.gram import pairs_of
from modelfuse.kernels.order_statistics import RANK_BITS, RANKS
from modelfuse.methods.random import GAMMA, MIX_1, MIX_2, SCALE, SHIFT

#: Elements per partial sum. Fixed, so that sums do not depend on slices and blocks.
CHUNK = 1 << 15


class DeviceKeepTables(NamedTuple):
    """Probabilities of keeping an element, by its magnitude's bin, on the device.

    Attributes:
        shift: Bits of a magnitude below those of its bin.
        models: A table per model, indexed by bin; −(slot + 1) refers to a subtable.
        subtables: All subtables, concatenated.
        levels: The most digits that a lookup takes.
    """

    shift: int
    models: list[Tensor]
    subtables: Tensor
    levels: int


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded sum and its rounding error (Knuth's two-sum)."""
    added = a + b
    of_b = added - a
    return added, (a - (added - of_b)) + (b - of_b)


class Arithmetic:
    """Arithmetic in one compute type with one library, for one pass.

    Args:
        library: The tensor library.
        compute: float32 or float64.
    """

    def __init__(self, library: Library, compute: str) -> None:
        self._library, self._compute, self._integer = library, compute, INTEGERS[compute]
        self._own = threading.local()

    def number(self, value: float) -> Tensor:
        """A number rounded once into the compute type."""
        return self._number(float(np.array(value, self._compute)), self._compute)

    def integer(self, value: int, dtype: str = "int64") -> Tensor:
        """A 0-dimensional integer tensor, int64 unless given; unsigned values wrap around."""
        width = 32 if dtype == "int32" else 64
        return self._number(value - (1 << width) if value >> (width - 1) else value, dtype)

    def _number(self, value: float | int, dtype: str) -> Tensor:
        """Cached per worker: a tensor made on one stream may not be ready on another."""
        known: dict[tuple[float | int, str], Tensor] = self._own.__dict__.setdefault("numbers", {})
        if (value, dtype) not in known:
            known[value, dtype] = self._library.number(value, dtype)
        return known[value, dtype]

    def kept(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x`` where true, else +0; masks the bits, which is faster than ``where``."""
        library = self._library
        ones = -library.cast(mask, self._integer)
        return library.view(library.view(x, self._integer) & ones, self._compute)

    def chosen(self, mask: Tensor, number: Tensor) -> Tensor:
        """``number`` where true, else +0."""
        return self.kept(self._library.cast(mask, self._compute) * number, mask)

    def magnitude_bits(self, x: Tensor) -> Tensor:
        """The bits of |x| as integers, which sort like the magnitudes."""
        return self._library.view(abs(x), self._integer)

    # Codecs -----------------------------------------------------------------------------------------------------------

    def decode(self, stored: Tensor) -> Tensor:
        """Widen stored elements to the compute type."""
        return self._library.cast(stored, self._compute)

    def encode(self, x: Tensor, dtype: DType) -> Tensor:
        """Round to the stored type, once."""
        if dtype.bits == 16 and self._compute == "float64":
            x = self._to_odd(x)
        return self._to_float16(x) if dtype is F16 else self._library.cast(x, str(dtype.torch))

    def _to_odd(self, x: Tensor) -> Tensor:
        """Round float64 to float32, to odd where inexact: a second rounding to 16 bits is then as good as one."""
        library, one = self._library, self.integer(1, "int32")
        single = library.cast(x, "float32")
        back, bits = library.cast(single, "float64"), library.view(single, "int32")
        odd = (bits - library.cast(abs(back) > abs(x), "int32")) | one
        return library.view(library.where((back < x) | (back > x), odd, bits), "float32")

    def _to_float16(self, x: Tensor) -> Tensor:
        """Round float32 to float16 by its bits: Paddle's cast gives nonzero values for what must underflow to zero.

        Adding 0.5 aligns the last bit of a float16 subnormal with that of float32, so that the addition rounds it.
        """
        library = self._library

        def integer(value: int) -> Tensor:
            return self.integer(value, "int32")

        bits = library.view(x, "int32")
        size = bits & integer(0x7FFFFFFF)
        tiny = library.view(library.view(size, "float32") + self._number(0.5, "float32"), "int32")
        odd = library.shift_right(size, 13) & integer(1)
        normal = library.shift_right(size - integer(0x38000000 - 0xFFF) + odd, 13)
        half = library.where(size < integer(0x38800000), tiny - integer(0x3F000000), normal)
        special = library.where(size > integer(0x7F800000), integer(0x7E00), integer(0x7C00))
        half = library.where(size < integer(0x47800000), half, special)
        return library.view(library.cast(half | (library.shift_right(bits, 16) & integer(0x8000)), "int16"), "float16")

    def count_bad(self, x: Tensor) -> Tensor:
        """The number of NaN or infinite elements: int64, 0-dimensional."""
        return self._library.count(~self._library.finite(x))

    # Draws and ranks --------------------------------------------------------------------------------------------------

    def counters(self, first: int, count: int) -> Tensor:
        """The counters that the draws of all models share: int64, one for two elements; ``first`` is even."""
        return self._library.arange(first // 2 + 1, (count + 1) // 2) * self.integer(GAMMA)

    def draws(self, counters: Tensor, key: int, count: int) -> Tensor:
        """The draws of :func:`modelfuse.methods.random.draws`, with wrapping 64-bit products."""
        library = self._library
        z = counters + self.integer(key)
        z = (z ^ library.shift_right(z, 30)) * self.integer(MIX_1)
        z = (z ^ library.shift_right(z, 27)) * self.integer(MIX_2)
        halves = library.view(z ^ library.shift_right(z, 31), "int32")[:count]
        return library.cast(library.shift_right(halves, SHIFT), "float32") * self._number(SCALE, "float32")

    def bins(self, bits: Tensor, shift: int) -> Tensor:
        """The bin of each magnitude: its leading bits, then a sticky bit (whether any remaining bit is set)."""
        rest = self.low_bits(bits, shift)
        sticky = self._library.cast(rest != self.integer(0, self._integer), self._integer)
        return self._library.shift_right(bits, shift) * self.integer(2, self._integer) + sticky

    def low_bits(self, bits: Tensor, count: int, dtype: str | None = None) -> Tensor:
        """The lowest ``count`` bits of integers; ``dtype`` is the type of ``bits``, by default that of magnitudes."""
        return bits & self.integer((1 << count) - 1, dtype or self._integer)

    def keep_probabilities(self, x: Tensor, tables: DeviceKeepTables, model: int) -> Tensor:
        """Each element's probability of being kept, looked up by the bits of its magnitude."""
        library, zero = self._library, self.number(0.0)
        bits = self.magnitude_bits(x)
        keep = library.take(tables.models[model], library.cast(self.bins(bits, tables.shift), "int64"))
        level = tables.shift
        for _ in range(tables.levels):
            level = max(level - RANK_BITS, 0)
            digits = library.shift_right(bits, level) & self.integer(RANKS - 1, self._integer)
            slots = library.cast(self.kept(-keep - self.number(1.0), keep < zero), "int64")
            entries = slots * self.integer(RANKS) + library.cast(digits, "int64")
            keep = library.where(keep < zero, library.take(tables.subtables, entries), keep)
        return keep

    # Sums -------------------------------------------------------------------------------------------------------------

    def dot_products(self, xs: list[Tensor]) -> Tensor:
        """Dot products of all pairs of models over every CHUNK elements in float64, with their rounding errors.

        Shape (products, 2, chunks), in the order of :func:`modelfuse.kernels.procedures.pairs_of`.
        """
        wide = self._padded(xs)
        return self._folded(wide[one] * wide[other] for one, other in pairs_of(len(xs)))

    def sums(self, xs: list[Tensor]) -> Tensor:
        """Sums of every CHUNK elements in float64, with their rounding errors, shape (tensors, 2, chunks)."""
        return self._folded(self._padded([each])[0] for each in xs)

    def _padded(self, xs: list[Tensor]) -> list[Tensor]:
        """In float64, padded with zeros to a multiple of CHUNK."""
        wide = [self._library.cast(each, "float64") for each in xs]
        if short := -xs[0].shape[0] % CHUNK:
            zeros = self.zeros(short)
            wide = [self._library.join(each, zeros) for each in wide]
        return wide

    def zeros(self, count: int) -> Tensor:
        """``count`` zeros, float64."""
        return self._library.cast(self._library.arange(0, count), "float64") * self._number(0.0, "float64")

    def _folded(self, terms: Iterable[Tensor]) -> Tensor:
        folded = (self.fold(each.reshape([-1, CHUNK])) for each in terms)
        return self._library.stack(*(self._library.stack(*each) for each in folded))

    def fold(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Pairwise sums along axis 1, and their rounding errors.

        Knuth's two-sum (The Art of Computer Programming, volume 2, section 4.2.2) gives the error of each addition, so
        that both together are as good as exact. An odd first element is added before halving.
        """
        width, lost = sums.shape[1], None
        while width > 1:
            odd, half = width % 2, width // 2
            a, b = sums[:, odd : odd + half], sums[:, odd + half :]
            added, error = _two_sum(a, b)
            if lost is not None:
                error = lost[:, odd : odd + half] + lost[:, odd + half :] + error
            if odd:
                added, error = self._add_first(sums, added, error, lost)
            sums, lost, width = added, error, half
        return sums[:, 0], self._without_loss(sums)[:, 0] if lost is None else lost[:, 0]

    def _add_first(self, sums: Tensor, added: Tensor, error: Tensor, lost: Tensor) -> tuple[Tensor, Tensor]:
        """Add the first of an odd number of terms to the first pair's sum."""
        first, more = _two_sum(added[:, :1], sums[:, :1])
        more = more if lost is None else more + lost[:, :1]
        if added.shape[1] == 1:
            return first, error + more
        concatenated = self._library.join_columns
        return concatenated(first, added[:, 1:]), concatenated(error[:, :1] + more, error[:, 1:])

    def _without_loss(self, sums: Tensor) -> Tensor:
        return sums * self._number(0.0, "float64")
