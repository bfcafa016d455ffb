"""Tensors of the base that an adapter scales (IA³) or of which it replaces rows, computed on read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.adapters.arrays import Array, load, read_values
from modelfuse.checkpoints.adapters.low_rank_terms import Shared, difference_type
from modelfuse.checkpoints.tensors import Reader
from modelfuse.dtypes import DType
from modelfuse.storage.files import Buffer

#: Elements that are computed at a time.
PIECE = 1 << 18


@dataclass(frozen=True, slots=True)
class ScaledTensor(StoredTensor):
    """A tensor of the base, scaled per output or per input by learned factors.

    That is IA³ (Liu et al. 2022, arXiv 2205.05638).

    Attributes:
        base: The base's tensor.
        numbers: The factors.
        axis: The axis of the base's tensor that they apply along.
        shared: State that all tensors of the adapter share.
    """

    base: StoredTensor
    numbers: StoredTensor
    axis: int
    shared: Shared = field(compare=False, repr=False)

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """The base's tensor and the adapter's."""
        return self.numbers, self.base

    @property
    def held(self) -> int:
        """The factors, and pieces of the base."""
        return self.dtype.nbytes(2 * self.numbers.size + 4 * min(PIECE, self.size)) + self.base.held

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading."""
        numbers: Array = self.shared.recent.get(self, lambda: load(self.numbers, self.shared.strict).ravel())
        inner = int(np.prod(self.shape[self.axis + 1 :], dtype=np.int64))
        with self.base.open() as base:

            def read(start: int, buffer: Buffer) -> None:
                whole = np.frombuffer(buffer, self.dtype.compute)
                for begin in range(0, whole.size, PIECE):
                    out = whole[begin : begin + PIECE]
                    at = np.arange(start + begin, start + begin + out.size) // inner % self.shape[self.axis]
                    out[:] = read_values(base, self.base.dtype, start + begin, out.size)
                    with np.errstate(all="ignore"):  # Non-finite values are counted by the passes.
                        out *= numbers[at]

            yield read


def scaled(base: StoredTensor, numbers: StoredTensor, out_first: bool, shared: Shared) -> ScaledTensor | None:
    """A weight of the base with IA³'s factors, which PEFT stores as [out, 1, …] or [1, in, …]; None if they do not fit.

    Args:
        base: The weight, or a bias, which only has outputs.
        numbers: The factors.
        out_first: Whether the base stores the weight as [out, in].
        shared: State that all tensors of the adapter share.
    """
    along = [axis for axis, length in enumerate(numbers.shape) if length == numbers.size][:1] or [0]
    axis = 0 if len(base.shape) == 1 else along[0] if out_first else 1 - along[0]
    if axis >= len(base.shape) or axis < 0 or base.shape[axis] != numbers.size:
        return None
    dtype = difference_type(base, numbers)
    return ScaledTensor(base.name, dtype, base.shape, numbers.file, 0, base, numbers, axis, shared)


@dataclass(frozen=True, slots=True)
class TrainedRowsTensor(StoredTensor):
    """A matrix of the base with trained rows, such as those of new tokens.

    Attributes:
        base: The base's tensor.
        trained: The trained rows, stacked.
        rows: The indices of these rows.
        shared: State that all tensors of the adapter share.
    """

    base: StoredTensor
    trained: StoredTensor
    rows: tuple[int, ...]
    shared: Shared = field(compare=False, repr=False)

    @property
    def natural(self) -> DType:
        """The base's."""
        return self.base.natural

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """The base's tensor and the adapter's."""
        return self.trained, self.base

    @property
    def held(self) -> int:
        """The trained rows, and pieces of the base."""
        return self.dtype.nbytes(2 * self.trained.size + 2 * min(PIECE, self.size)) + self.base.held

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading."""
        trained: Array = self.shared.recent.get(self, lambda: load(self.trained, self.shared.strict))
        width = self.shape[1]
        with self.base.open() as base:

            def read(start: int, buffer: Buffer) -> None:
                out = np.frombuffer(buffer, self.dtype.compute)
                for begin in range(0, out.size, PIECE):
                    part = out[begin : begin + PIECE]
                    part[:] = read_values(base, self.base.dtype, start + begin, part.size)
                for number, row in enumerate(self.rows):
                    first, last = max(row * width, start), min((row + 1) * width, start + out.size)
                    if first < last:
                        out[first - start : last - start] = trained[number, first - row * width : last - row * width]

            yield read


@dataclass(frozen=True, slots=True)
class SummedTensor(StoredTensor):
    """A weight and a difference to it, where the difference alone means nothing to the base.

    Attributes:
        base: The weight.
        difference: The difference.
    """

    base: StoredTensor
    difference: StoredTensor

    @classmethod
    def of(cls, base: StoredTensor, difference: StoredTensor) -> SummedTensor:
        """Their sum."""
        return cls(base.name, difference_type(base, difference), base.shape, base.file, 0, base, difference)

    @property
    def natural(self) -> DType:
        """The weight's."""
        return self.base.natural

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """Both."""
        return self.difference, self.base

    @property
    def held(self) -> int:
        """What the difference holds, and pieces."""
        return self.difference.held + self.dtype.nbytes(3 * min(PIECE, self.size)) + self.base.held

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading."""
        with self.base.open() as base, self.difference.open() as difference:

            def read(start: int, buffer: Buffer) -> None:
                whole = np.frombuffer(buffer, self.dtype.compute)
                for begin in range(0, whole.size, PIECE):
                    out = whole[begin : begin + PIECE]
                    out[:] = read_values(base, self.base.dtype, start + begin, out.size)
                    out += read_values(difference, self.difference.dtype, start + begin, out.size)

            yield read


def with_rows(
    base: StoredTensor, trained: StoredTensor, rows: tuple[int, ...], shared: Shared
) -> TrainedRowsTensor | None:
    """An embedding of the base with trained rows; None if they do not fit."""
    fits = len(base.shape) == 2 and trained.shape == (len(rows), base.shape[1]) and max(rows, default=0) < base.shape[0]
    if not fits:
        return None
    dtype = difference_type(base, trained)
    return TrainedRowsTensor(base.name, dtype, base.shape, trained.file, 0, base, trained, rows, shared)
