"""Tensors whose elements do not lie in the file in row-major, little-endian order."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from modelfuse.checkpoints.files import Buffer
from modelfuse.checkpoints.tensors import Reader, StoredTensor
from modelfuse.dtypes import DType
from modelfuse.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class StridedTensor(StoredTensor):
    """A transposed, expanded or otherwise strided view of a storage, or one of big-endian elements.

    The file is mapped while the tensor is open, for a slice of a transposed matrix touches all of it.

    Attributes:
        strides: The distance between neighbours along each dimension, in elements; zero for an
            expanded dimension.
        big_endian: Whether the bytes of each element are stored most significant first.
    """

    strides: tuple[int, ...]
    big_endian: bool = False

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading; elements come out in row-major, little-endian order."""
        with self.file.open() as descriptor:
            view = self._map(descriptor)
            element = _element(self.dtype, "<")

            def read(start: int, buffer: Buffer) -> None:
                _copy(view, start, np.frombuffer(buffer, element))

            yield read

    def _map(self, descriptor: int) -> Array:
        element = _element(self.dtype, ">" if self.big_endian else "<")
        extent = extent_of(self.shape, self.strides) * element.itemsize
        begin = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        try:
            mapped = mmap.mmap(
                descriptor, self.offset + extent - begin, access=mmap.ACCESS_READ, offset=begin
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.file.path}: tensor {self.name!r} cannot be mapped: {error}") from error
        storage = np.frombuffer(mapped, element, extent // element.itemsize, self.offset - begin)
        kept = [(size, stride) for size, stride in zip(self.shape, self.strides, strict=True) if size > 1]
        shape = tuple(size for size, _ in kept) or (1,)
        strides = tuple(stride * element.itemsize for _, stride in kept) or (element.itemsize,)
        return as_strided(storage, shape, strides, writeable=False)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a tensor stored without gaps, the last dimension fastest.

    >>> row_major((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements follow one another in row-major order; dimensions of size one do not matter."""
    wanted = row_major(shape)
    return all(size == 1 or stride == want for size, stride, want in zip(shape, strides, wanted, strict=True))


def extent_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many elements of storage a tensor reaches over; nothing in it may be of size zero.

    >>> extent_of((2, 3), (1, 2))
    6
    """
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _element(dtype: DType, order: str) -> np.dtype[Any]:
    # A complex number swaps the bytes of each half; anything else is moved as an integer of its size.
    kind = "c" if dtype.name.startswith("C") else "u"
    return np.dtype(f"{order}{kind}{dtype.bytes}")


def _copy(view: Array, start: int, out: Array) -> None:
    """Copy the elements of ``view`` from number ``start`` on, in row-major order, until ``out`` is full."""
    if view.ndim == 1:
        out[:] = view[start : start + out.size]
        return
    row_size = math.prod(view.shape[1:])
    row, skipped = divmod(start, row_size)
    if skipped:
        count = min(row_size - skipped, out.size)
        _copy(view[row], skipped, out[:count])
        row, out = row + 1, out[count:]
    rows = out.size // row_size
    if rows:
        out[: rows * row_size].reshape(rows, *view.shape[1:])[...] = view[row : row + rows]
    rest = out[rows * row_size :]
    if rest.size:
        _copy(view[row + rows], 0, rest)
