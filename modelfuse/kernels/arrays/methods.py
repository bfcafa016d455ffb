"""The methods over tensors of any library, operation by operation as :mod:`modelfuse.methods` defines them.

Every function takes blocks: one-dimensional tensors of the compute type, float32 or float64. No operation fuses two
roundings and none adds up in an order of its own, so the bits are those of the definitions on any device.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from modelfuse.dtypes import F16, DType
from modelfuse.kernels.arrays.library import INTEGERS, Array, Library, Tensor
from modelfuse.methods.random import GAMMA, MIX_1, MIX_2, SCALE, SHIFT
from modelfuse.methods.ties import MIN_DIVISOR

#: Elements a partial sum. Fixed, so that sums do not depend on slices and blocks.
CHUNK = 1 << 15


@dataclass(frozen=True)
class Sparsifier:
    """What it takes to sparsify any element of a tensor.

    Attributes:
        kind: ``trim``, ``dare``, ``magprune`` or None.
        compute: float32 or float64.
        rescale: Whether to divide what is kept by its probability.
        keys: The random streams, one a model.
        numbers: Threshold and factor of trim; probability, and whether there is anything to drop, of dare and
            magprune; one pair a model.
        shift: The bits of a magnitude below a bin of ``tables``.
        digit_bits: By so many bits more each subtable looks.
        tables: magprune's probabilities of being kept by bin, one table a model; −(slot + 1) where a subtable
            says more.
        subtables: Shape (slots, 2^digit_bits): the same by the next digit.
        levels: How many digits there are at most.
    """

    kind: str | None
    compute: str
    rescale: bool = True
    keys: Sequence[int] = ()
    numbers: Sequence[tuple[float, float]] = ()
    shift: int = 0
    digit_bits: int = 1
    tables: Sequence[Array] = ()
    subtables: Array = field(default_factory=lambda: np.ones((0, 2)))
    levels: int = 0


class Arithmetic:
    """A library's arithmetic in one compute type, for one pass.

    Args:
        library: Whose tensors.
        compute: float32 or float64.
    """

    def __init__(self, library: Library, compute: str) -> None:
        self._library, self._compute, self._integer = library, compute, INTEGERS[compute]
        self._own = threading.local()

    def number(self, value: float) -> Tensor:
        """A number rounded once into the compute type."""
        return self._number(float(np.array(value, self._compute)), self._compute)

    def integer(self, value: int, dtype: str = "int64") -> Tensor:
        """An integer of 64 bits or, with ``dtype``, of others; unsigned ones wrap around."""
        width = 32 if dtype == "int32" else 64
        return self._number(value - (1 << width) if value >> (width - 1) else value, dtype)

    def _number(self, value: float | int, dtype: str) -> Tensor:
        """Made once for each worker: what was made on one's stream may not be ready on another's."""
        known: dict[tuple[float | int, str], Tensor] = self._own.__dict__.setdefault("numbers", {})
        if (value, dtype) not in known:
            known[value, dtype] = self._library.number(value, dtype)
        return known[value, dtype]

    def kept(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x`` where true, else +0: by its bits, which is faster than a choice between two tensors."""
        library = self._library
        ones = -library.cast(mask, self._integer)
        return library.view(library.view(x, self._integer) & ones, self._compute)

    def magnitude_bits(self, x: Tensor) -> Tensor:
        """The bits of |x| as integers, which sort as the magnitudes do."""
        return self._library.view(abs(x), self._integer)

    # Codecs -----------------------------------------------------------------------------------------------------------

    def decode(self, stored: Tensor) -> Tensor:
        """Widen stored elements to the compute type."""
        return self._library.cast(stored, self._compute)

    def encode(self, x: Tensor, dtype: DType) -> Tensor:
        """Round to the type to store, once."""
        if dtype.bits == 16 and self._compute == "float64":
            x = self._to_odd(x)
        return self._to_float16(x) if dtype is F16 else self._library.cast(x, str(dtype.torch))

    def _to_odd(self, x: Tensor) -> Tensor:
        """float32 rounded to odd where inexact: then a second rounding to 16 bits is as good as one."""
        library, one = self._library, self.integer(1, "int32")
        single = library.cast(x, "float32")
        back, bits = library.cast(single, "float64"), library.view(single, "int32")
        odd = (bits - library.cast(abs(back) > abs(x), "int32")) | one
        return library.view(library.where((back < x) | (back > x), odd, bits), "float32")

    def _to_float16(self, x: Tensor) -> Tensor:
        """Round float32 by its bits: Paddle's own cast makes numbers of what is far too small for any.

        Adding 0.5 aligns a subnormal's last bit with float32's, so the addition rounds it.
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
        """How many are NaN or infinite, int64, 0-dimensional."""
        return self._library.count(~self._library.finite(x))

    # Sparsifiers ------------------------------------------------------------------------------------------------------

    def counters(self, first: int, count: int) -> Tensor:
        """What the draws of all models have in common, int64, one for two elements; ``first`` is even."""
        return self._library.arange(first // 2 + 1, (count + 1) // 2) * self.integer(GAMMA)

    def draws(self, counters: Tensor, key: int, count: int) -> Tensor:
        """The draws of :func:`modelfuse.methods.random.draws`; 64-bit products wrap around with or without sign."""
        library = self._library
        z = counters + self.integer(key)
        z = (z ^ library.shift_right(z, 30)) * self.integer(MIX_1)
        z = (z ^ library.shift_right(z, 27)) * self.integer(MIX_2)
        halves = library.view(z ^ library.shift_right(z, 31), "int32")[:count]
        return library.cast(library.shift_right(halves, SHIFT), "float32") * self._number(SCALE, "float32")

    def trim(self, x: Tensor, threshold: float, factor: float) -> Tensor:
        """Keep magnitudes from the threshold on."""
        return self.kept(x, abs(x) >= self.number(threshold)) * self.number(factor)

    def dare(self, x: Tensor, draws: Tensor, reserve_p: float, rescale: bool) -> Tensor:
        """Keep each element with one probability."""
        kept = self.kept(x, draws < self._number(float(np.float32(reserve_p)), "float32"))
        return kept / self.number(reserve_p) if rescale else kept

    def magprune(self, x: Tensor, draws: Tensor, keep: Tensor, rescale: bool) -> Tensor:
        """Keep each element with its own probability."""
        kept = self.kept(x, draws < self._library.cast(keep, "float32"))
        return kept / keep if rescale else kept

    def bins(self, bits: Tensor, shift: int) -> Tensor:
        """Leading bits, followed by a bit that says whether any of the remaining ones is set."""
        rest = self.low_bits(bits, shift)
        sticky = self._library.cast(rest != self.integer(0, self._integer), self._integer)
        return self._library.shift_right(bits, shift) * self.integer(2, self._integer) + sticky

    def low_bits(self, bits: Tensor, count: int, dtype: str | None = None) -> Tensor:
        """The last bits of integers, of the magnitudes' type unless given."""
        return bits & self.integer((1 << count) - 1, dtype or self._integer)

    def keep_probabilities(self, x: Tensor, how: Sparsifier, table: Tensor, subtables: Tensor) -> Tensor:
        """Look up each element's probability of being kept by its magnitude's bits.

        Args:
            x: One model's elements.
            how: How the bits index the tables.
            table: The model's table, on the device.
            subtables: All subtables in a row, on the device.
        """
        library, zero = self._library, self.number(0.0)
        bits = self.magnitude_bits(x)
        keep = library.take(table, library.cast(self.bins(bits, how.shift), "int64"))
        level = how.shift
        for _ in range(how.levels):
            level = max(level - how.digit_bits, 0)
            digits = library.shift_right(bits, level) & self.integer((1 << how.digit_bits) - 1, self._integer)
            slots = library.cast(self.kept(-keep - self.number(1.0), keep < zero), "int64")
            entries = slots * self.integer(1 << how.digit_bits) + library.cast(digits, "int64")
            keep = library.where(keep < zero, library.take(subtables, entries), keep)
        return keep

    # Merges -----------------------------------------------------------------------------------------------------------

    def linear(self, xs: list[Tensor], weights: Sequence[float]) -> Tensor:
        """The weighted sum."""
        total = xs[0] * self.number(weights[0])
        for x, weight in zip(xs[1:], weights[1:], strict=True):
            total = total + x * self.number(weight)
        return total

    def ties(self, xs: list[Tensor], weights: Sequence[float], by_count: bool, normalize: bool) -> Tensor:
        """Elect a sign for every element, and sum those that agree. ``xs`` are used up."""
        zero = self.number(0.0)
        for model, weight in enumerate(weights):
            xs[model] = xs[model] * self.number(weight)
        elected = self._vote(xs[0], by_count)
        for y in xs[1:]:
            elected = elected + self._vote(y, by_count)
        positive = elected >= zero
        del elected
        result: Tensor = None
        divisor: Tensor = None
        for y, weight in zip(xs, weights, strict=True):
            agrees = (positive & (y > zero)) | (~positive & (y < zero))
            agreeing = self.kept(y, agrees)
            result = zero + agreeing if result is None else result + agreeing
            if normalize:
                own = self._library.cast(agrees, self._compute) * self.number(weight)
                divisor = zero + own if divisor is None else divisor + own
        if not normalize:
            return result
        divides = abs(divisor) >= self.number(MIN_DIVISOR)
        return result / self._library.where(divides, divisor, self.number(1.0))

    def _vote(self, y: Tensor, by_count: bool) -> Tensor:
        if not by_count:
            return y
        library, zero = self._library, self.number(0.0)
        return library.cast(y > zero, self._compute) - library.cast(y < zero, self._compute)

    # Sums -------------------------------------------------------------------------------------------------------------

    def dot_products(self, x: Tensor, y: Tensor) -> Tensor:
        """x·x, y·y and x·y in float64 of every CHUNK elements, and what their additions lost, shape (3, 2, chunks)."""
        library, size = self._library, x.shape[0]
        wide = [library.cast(each, "float64") for each in (x, y)]
        if short := -size % CHUNK:
            zeros = library.cast(library.arange(0, short), "float64") * self._number(0.0, "float64")
            wide = [library.join(each, zeros) for each in wide]
        pairs = ((wide[0], wide[0]), (wide[1], wide[1]), (wide[0], wide[1]))
        return library.stack(*(self._fold((a * b).reshape([-1, CHUNK])) for a, b in pairs))

    def _fold(self, sums: Tensor) -> Tensor:
        """The sum of each row, and what its additions lost: halves are added to each other until one is left.

        Knuth's two-sum (The Art of Computer Programming, volume 2, section 4.2.2) finds each addition's error, so
        that the two together are as good as exact.
        """
        lost: Tensor = None
        width = CHUNK
        while width > 1:
            width //= 2
            a, b = sums[:, :width], sums[:, width:]
            sums = a + b
            of_b = sums - a
            error = (a - (sums - of_b)) + (b - of_b)
            lost = error if lost is None else lost[:, :width] + lost[:, width:] + error
        return self._library.stack(sums[:, 0], lost[:, 0])
