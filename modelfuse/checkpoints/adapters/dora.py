"""DoRA: weights with learned magnitudes of their outputs.

With W the base's weight, DoRA gives m·(W + scale·B·A)/‖W + scale·B·A‖, a magnitude m and a norm for each output
(Liu et al. 2024, arXiv 2402.09353).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.adapters.arrays import Array, load, read_values
from modelfuse.checkpoints.adapters.computed_tensors import LowRankTensor
from modelfuse.checkpoints.tensors import Reader
from modelfuse.storage.files import Buffer

#: Elements of the base per piece, for its norms; whole rows, at least one.
PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class DoraTensor(StoredTensor):
    """A weight with learned magnitudes of its outputs.

    Attributes:
        base: The base's weight.
        difference: scale·B·A.
        magnitude: One number per output.
    """

    base: StoredTensor
    difference: LowRankTensor
    magnitude: StoredTensor

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """The factors, the magnitudes and the base's weight."""
        return self.difference, self.magnitude, self.base

    @property
    def held(self) -> int:
        """The factors, the norms, and a piece of the base beside its difference."""
        piece = 3 * self.dtype.nbytes(max(PIECE, self._columns))
        return self.difference.held + 3 * self.dtype.nbytes(self.magnitude.size) + piece + self.base.held

    @property
    def _columns(self) -> int:
        return self.size // max(self.shape[0], 1)

    def factors(self) -> Array:
        """magnitude/‖W + scale·B·A‖, one per output."""
        found: Array = self.difference.shared.recent.get(self, self._measure)
        return found

    def _measure(self) -> Array:
        squares = np.zeros(self.magnitude.size)
        step = max(PIECE // self._columns, 1)
        with self.base.open() as base, self.difference.open() as difference:
            for row in range(0, self.shape[0], step):
                rows = min(step, self.shape[0] - row)
                whole = self._sum(base, difference, row * self._columns, rows * self._columns)
                part = np.square(whole.reshape(rows, -1), dtype=np.float64)
                if self.difference.out_first:
                    squares[row : row + rows] = np.cumsum(part, axis=1)[:, -1]
                else:
                    for each in part:  # Sequentially: the order of a library's sums depends on their number.
                        squares += each
        magnitude = load(self.magnitude, self.difference.shared.strict).ravel()
        with np.errstate(all="ignore"):  # Non-finite values are counted by the passes.
            return (magnitude / np.sqrt(squares)).astype(self.dtype.compute)

    def _sum(self, base: Reader, difference: Reader, start: int, count: int) -> Array:
        read = read_values(difference, self.difference.dtype, start, count)
        whole: Array = read_values(base, self.base.dtype, start, count) + read
        return whole.astype(self.dtype.compute, copy=False)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading."""
        factors = self.factors()
        with self.base.open() as base, self.difference.open() as difference:

            def read(start: int, buffer: Buffer) -> None:
                whole = np.frombuffer(buffer, self.dtype.compute)
                for begin in range(0, whole.size, PIECE // 4):
                    out = whole[begin : begin + PIECE // 4]
                    numbers = np.arange(start + begin, start + begin + out.size)
                    outputs = numbers // self._columns if self.difference.out_first else numbers % self._columns
                    out[:] = self._sum(base, difference, start + begin, out.size)
                    with np.errstate(all="ignore"):
                        out *= factors[outputs]

            yield read
