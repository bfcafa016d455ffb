"""Tensors whose elements do not lie in the file in row-major, little-endian order."""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from modelfuse.checkpoints.files import Buffer, SourceFile
from modelfuse.checkpoints.tensors import Reader, StoredTensor
from modelfuse.dtypes import DType
from modelfuse.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]

_PIECE = 1 << 20
_TILE = 32
#: Pages of a mapped file are given back when so many bytes of them may be resident.
RESIDENT = 32 << 20


@dataclass(frozen=True, slots=True)
class StridedTensor(StoredTensor):
    """A transposed, expanded or otherwise strided view of a storage, or one of big-endian elements.

    The file is mapped while the tensor is open, for a slice of a transposed matrix touches all of it.

    Attributes:
        strides: The distance between neighbours along each dimension, in elements; zero for an
            expanded dimension.
        big_endian: Whether the bytes of each element are stored most significant first.
        dims: The dimensions that ``strides`` are of, where they are finer than those of the shape: together
            they hold the same elements in the same order.
    """

    strides: tuple[int, ...]
    big_endian: bool = False
    dims: tuple[int, ...] = ()

    @property
    def held(self) -> int:
        """Pages of the file that are mapped."""
        return min(self.nbytes, RESIDENT)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading; elements come out in row-major, little-endian order."""
        with self.file.open() as descriptor:
            yield _Mapped(self, descriptor, self.offset).read


@dataclass(frozen=True, slots=True)
class ReorderedTensor(StoredTensor):
    """A tensor whose source cannot be mapped: copied to an unnamed temporary file while it is open.

    Attributes:
        source: The same elements, and perhaps more, in the order in which they are stored.
        strides: As of a StridedTensor, over the elements of ``source``.
        big_endian: Whether ``source`` gives the bytes of each element most significant first.
        dims: As of a StridedTensor.
        first: The number of this tensor's first element in ``source``.
    """

    source: StoredTensor
    strides: tuple[int, ...]
    big_endian: bool = False
    dims: tuple[int, ...] = ()
    first: int = 0

    @property
    def natural(self) -> DType:
        """That of the source."""
        return self.source.natural

    @property
    def stored(self) -> DType:
        """That of the source."""
        return self.source.stored

    @property
    def is_delta(self) -> bool:
        """That of the source."""
        return self.source.is_delta

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Those of the source."""
        return self.source.files

    @property
    def held(self) -> int:
        """Pages of the copy that are mapped."""
        return min(self.nbytes, RESIDENT) + self.source.held + _PIECE

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading; elements come out in row-major, little-endian order."""
        with self.source.open() as read, tempfile.TemporaryFile() as copy:
            piece = memoryview(bytearray(_PIECE // self.dtype.bytes * self.dtype.bytes))
            try:
                for begin in range(0, self.source.nbytes, len(piece)):
                    part = piece[: self.source.nbytes - begin]
                    read(begin // self.dtype.bytes, part)
                    copy.write(part)
                copy.flush()
            except OSError as error:
                raise CheckpointError(
                    f"{self.file.path}: tensor {self.name!r} needs a temporary copy: {error.strerror}",
                    "Set TMPDIR to a folder with more room.",
                ) from error
            yield _Mapped(self, copy.fileno(), self.dtype.nbytes(self.first)).read


class _Mapped:
    """A strided tensor in a mapped file, of which only some pages are resident at a time.

    Args:
        tensor: The tensor.
        descriptor: The open file.
        offset: Where its first element lies in the file.
    """

    def __init__(self, tensor: StridedTensor | ReorderedTensor, descriptor: int, offset: int) -> None:
        element = _element(tensor.dtype, ">" if tensor.big_endian else "<")
        dims, strides = tensor.dims or tensor.shape, tensor.strides
        extent = extent_of(dims, strides)
        begin = offset - offset % mmap.ALLOCATIONGRANULARITY
        length = offset - begin + extent * element.itemsize
        try:
            self._pages = mmap.mmap(descriptor, length, access=mmap.ACCESS_READ, offset=begin)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{tensor.file.path}: tensor {tensor.name!r} cannot be mapped: {error}") from error
        storage = np.frombuffer(self._pages, element, extent, offset - begin)
        kept = [(size, stride) for size, stride in zip(dims, strides, strict=True) if size > 1]
        shape = tuple(size for size, _ in kept) or (1,)
        steps = tuple(stride * element.itemsize for _, stride in kept) or (element.itemsize,)
        self._view: Array = as_strided(storage, shape, steps, writeable=False)
        self._element = _element(tensor.dtype, "<")
        self._resident = 0

    def read(self, start: int, buffer: Buffer) -> None:
        """Fill the buffer with the elements from number ``start`` on, in row-major order."""
        self._copy(self._view, start, np.frombuffer(buffer, self._element))

    def _copy(self, view: Array, start: int, out: Array) -> None:
        if view.ndim == 1:
            self._take(view[start : start + out.size], out)
            return
        row_size = math.prod(view.shape[1:])
        row, skipped = divmod(start, row_size)
        if skipped:
            count = min(row_size - skipped, out.size)
            self._copy(view[row], skipped, out[:count])
            row, out = row + 1, out[count:]
        rows = out.size // row_size
        if rows:
            self._copy_rows(view[row : row + rows], out[: rows * row_size].reshape(rows, *view.shape[1:]))
        rest = out[rows * row_size :]
        if rest.size:
            self._copy(view[row + rows], 0, rest)

    def _copy_rows(self, view: Array, out: Array) -> None:
        # Reading a transposed matrix along its rows touches a cache line for every element: narrow columns
        # keep those lines in the cache until the next rows need them.
        across = view.strides[-1] != view.itemsize and len(view) >= _TILE
        width = _TILE if across else view.shape[-1]
        for begin in range(0, view.shape[-1], width):
            self._take(view[..., begin : begin + width], out[..., begin : begin + width])

    def _take(self, view: Array, out: Array) -> None:
        out[...] = view
        # Pages between those that are touched come along: systems map several at a time.
        self._resident += extent_of(view.shape, view.strides) + mmap.PAGESIZE
        if self._resident > RESIDENT:
            self._pages.madvise(mmap.MADV_DONTNEED)
            self._resident = 0


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a tensor stored without gaps, the last dimension fastest.

    >>> row_major((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def is_plain(dtype: DType, shape: tuple[int, ...], strides: tuple[int, ...], big_endian: bool) -> bool:
    """Whether elements lie in row-major, little-endian order; dimensions of size one do not matter."""
    wanted = row_major(shape)
    ordered = all(size == 1 or step == want for size, step, want in zip(shape, strides, wanted, strict=True))
    return ordered and (not big_endian or dtype.bytes == 1)


def place(
    name: str,
    dtype: DType,
    shape: tuple[int, ...],
    file: SourceFile,
    offset: int,
    strides: tuple[int, ...],
    big_endian: bool,
) -> StoredTensor:
    """A tensor of these strides at this offset: plain if it can be, otherwise a StridedTensor."""
    if is_plain(dtype, shape, strides, big_endian):
        return StoredTensor(name, dtype, shape, file, offset)
    return StridedTensor(name, dtype, shape, file, offset, strides, big_endian)


def extent_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many elements of storage a tensor reaches over; nothing in it may be of size zero.

    >>> extent_of((2, 3), (1, 2))
    6
    """
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def reorder(content: bytes, tensor: StoredTensor, strides: tuple[int, ...], big_endian: bool) -> bytes:
    """The bytes of a small tensor in row-major, little-endian order."""
    elements = np.frombuffer(content, _element(tensor.dtype, ">" if big_endian else "<"))
    steps = tuple(stride * elements.itemsize for stride in strides)
    return as_strided(elements, tensor.shape, steps).astype(_element(tensor.dtype, "<")).tobytes()


def _element(dtype: DType, order: str) -> np.dtype[Any]:
    # A complex number swaps the bytes of each half; anything else is moved as an integer of its size.
    kind = "c" if dtype.name.startswith("C") else "u"
    return np.dtype(f"{order}{kind}{dtype.bytes}")
