"""Histograms (tallies) of a tensor's magnitudes, with a library's operations.

The searches are those of :mod:`modelfuse.kernels.order_statistics`, so thresholds, factors and probabilities equal
those of the compiled kernels.
"""

from __future__ import annotations

import numpy as np

from modelfuse.kernels import Bytes, Work
from modelfuse.kernels.arrays.arithmetic import Arithmetic
from modelfuse.kernels.arrays.blocks import ArrayState, Walk
from modelfuse.kernels.arrays.chained import Chained
from modelfuse.kernels.arrays.library import Array, Library, Tensor
from modelfuse.kernels.element import Element, Merged
from modelfuse.kernels.measures import add_up, add_up_models
from modelfuse.kernels.order_statistics import BINS, FLOAT_ENCODINGS, LOW_BITS

#: Bytes of a tally's tables on the device: a count and two sums per bin, and temporaries to gather those in use.
TABLE_BYTES = BINS * 32


def _rest_sums(library: Library, arithmetic: Arithmetic, bins: Tensor, rest: Tensor, wide: bool) -> tuple[Tensor, ...]:
    """Sums by bin of the low remaining bits and, if ``wide``, of the high ones.

    Each sum stays far below 2⁵³, so float64 adds it up exactly in any order.
    """
    if not wide:
        return (library.bincount(bins, 0, library.cast(rest, "float64")),)
    low = rest & arithmetic.integer((1 << LOW_BITS) - 1)
    high = library.shift_right(rest, LOW_BITS)
    return tuple(library.bincount(bins, 0, library.cast(part, "float64")) for part in (low, high))


class Gather(Walk):
    """The pass that finds the bits of all magnitudes: int32 or int64, as the compute type; shape (models, elements)."""

    scratch = 40

    def start(self) -> ArrayState:
        return self._state([])

    def block(self, state: ArrayState, first: int, xs: list[Tensor], base: Tensor | None, out: Bytes) -> None:
        bits = [self._library.fetch(self._arithmetic.magnitude_bits(x)) for x in xs]
        state.found.append(np.stack(bits))

    def finish(self, state: ArrayState) -> Array:
        found = np.concatenate(state.found, axis=1)
        return found.view(f"u{found.itemsize}")


class _Counting(Chained):
    """A pass that tallies magnitudes: of the models or, if ``merged`` is given, of an expression of all models."""

    def __init__(self, work: Work, library: Library, merged: Merged | None) -> None:
        super().__init__(work, library, merged.element if merged else Element())
        self._made = merged

    def _magnitudes(self, state: ArrayState, first: int, xs: list[Tensor], base: Tensor | None) -> list[Tensor]:
        """The tensors whose magnitudes are counted."""
        if self._made is None:
            return xs
        self._apply_element(state, first, xs)
        evaluation = self._merged(first, xs, base, self._made.numbers)
        return [evaluation.of_model(self._made.expression, model) for model in range(self._counted)]

    @property
    def _counted(self) -> int:
        """The number of those tensors."""
        return self._work.models if self._made is None or self._made.expression.each else 1


class TallyAll(_Counting):
    """The pass that tallies all magnitudes; finds, for each model, the bins that hold any and their rows."""

    def __init__(self, work: Work, library: Library, merged: Merged | None = None) -> None:
        super().__init__(work, library, merged)
        self._shift = FLOAT_ENCODINGS[work.compute].shift
        self._sums = merged.sums if merged else work.method.needs_sums
        self.fixed, self.scratch = TABLE_BYTES, 40 if merged is None else Chained.scratch

    def start(self) -> ArrayState:
        state = super().start()
        state.found = [[] for _ in range(self._counted)]
        return state

    def block(self, state: ArrayState, first: int, xs: list[Tensor], base: Tensor | None, out: Bytes) -> None:
        library, arithmetic = self._library, self._arithmetic
        xs = self._magnitudes(state, first, xs, base)
        for model, parts in enumerate(state.found):
            bits = arithmetic.magnitude_bits(xs[model])
            xs[model] = None
            bins, rest = arithmetic.bins(bits, self._shift), arithmetic.low_bits(bits, self._shift)
            counts = library.bincount(bins, 0)
            used = library.nonzero(counts != arithmetic.integer(0))
            wide = self._work.compute == "float64"
            sums = _rest_sums(library, arithmetic, bins, rest, wide) if self._sums else ()
            rows = np.zeros((used.shape[0], 3), np.uint64)
            for column, values in enumerate((counts, *sums)):
                rows[:, column] = library.fetch(library.take(values, used))
            parts.append((library.fetch(used).astype(np.uint64), rows))
            if sum(len(bins) for bins, _ in parts) > BINS:  # Bounds the memory to a few tables.
                parts[:] = [add_up(parts)]

    def finish(self, state: ArrayState) -> list[tuple[Array, Array]]:
        return [add_up(parts) for parts in state.found]

    def fold(self, one: list[tuple[Array, Array]], other: list[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
        """The sums of two spans' tallies."""
        return add_up_models(one, other)


class TallyWithin(_Counting):
    """The pass that tallies chosen bins by the next digit; finds uint64 tables, shape (bins, digits, 3)."""

    once = False

    def __init__(
        self,
        work: Work,
        library: Library,
        prefixes: list[Array],
        shifts: tuple[int, int],
        digit_bits: int,
        merged: Merged | None = None,
    ) -> None:
        super().__init__(work, library, merged)
        self._prefixes, self._shifts, self._digits = prefixes, shifts, 1 << digit_bits
        self.fixed = max(map(len, prefixes)) * self._digits * 32

    def start(self) -> ArrayState:
        state = super().start()
        state.found = np.zeros((sum(map(len, self._prefixes)), self._digits, 3), np.uint64)
        with self._library.working():
            state.prefixes = [self._library.to_device(own.astype(np.int64)) for own in self._prefixes]
        return state

    def block(self, state: ArrayState, first: int, xs: list[Tensor], base: Tensor | None, out: Bytes) -> None:
        library, arithmetic = self._library, self._arithmetic
        row, xs = 0, self._magnitudes(state, first, xs, base)
        for model, own in enumerate(self._prefixes):
            bits = arithmetic.magnitude_bits(xs[model])
            xs[model] = None
            if own.size:
                slots, chosen = self._slots(library.cast(bits, "int64"), state.prefixes[model])
                if slots.shape[0]:
                    self._count(state.found[row : row + len(own)], slots, chosen)
            row += len(own)

    def _slots(self, bits: Tensor, prefixes: Tensor) -> tuple[Tensor, Tensor]:
        """For the magnitudes in the chosen bins: the table index and the bits of each."""
        library, arithmetic = self._library, self._arithmetic
        parent_shift, shift = self._shifts
        leading = library.shift_right(bits, parent_shift)
        rows = library.find(prefixes, leading)
        # There is no prefix after the last one to compare with.
        rows = rows - library.cast(rows >= arithmetic.integer(prefixes.shape[0]), "int64")
        hits = library.nonzero(library.take(prefixes, rows) == leading)
        chosen = library.take(bits, hits)
        digits = library.shift_right(chosen, shift) & arithmetic.integer(self._digits - 1)
        return library.take(rows, hits) * arithmetic.integer(self._digits) + digits, chosen

    def _count(self, table: Array, slots: Tensor, bits: Tensor) -> None:
        library, arithmetic = self._library, self._arithmetic
        rest = arithmetic.low_bits(bits, self._shifts[1], "int64")
        counted = (library.bincount(slots, 0), *_rest_sums(library, arithmetic, slots, rest, True))
        for column, values in enumerate(counted):
            flat = library.fetch(values).astype(np.uint64)
            rows = np.zeros(table.shape[0] * self._digits, np.uint64)
            rows[: flat.size] = flat
            table[:, :, column] += rows.reshape(-1, self._digits)

    def finish(self, state: ArrayState) -> Array:
        tables: Array = state.found
        return tables

    def fold(self, one: Array, other: Array) -> Array:
        """The sums of two spans' tables."""
        one += other
        return one
