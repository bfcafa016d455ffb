"""Tensors that are not stored in row-major, little-endian order."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from modelfuse.checkpoints.tensors import MovedTensor, Reader, StoredTensor
from modelfuse.dtypes import DType
from modelfuse.errors import CheckpointError
from modelfuse.storage.files import Buffer, OpenFile, SourceFile

Array = np.ndarray[Any, np.dtype[Any]]

_PIECE = 1 << 20
_TILE = 32
#: Bytes of storage that are read at a time: a slice of a transposed matrix is spread over all of it.
MOST_READ = 16 << 20
#: Rows are read together with the gaps between them if at least one in so many elements is needed.
MOST_WASTED = 4


@dataclass(frozen=True, slots=True)
class StridedTensor(StoredTensor):
    """A transposed, expanded or otherwise strided view of a storage, or one of big-endian elements.

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
    def reader_bytes(self) -> int:
        """The storage that is read at a time."""
        return MOST_READ

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading, in row-major, little-endian order."""
        with self.file.open() as file:
            yield _gatherer(self, file, self.offset).read


@dataclass(frozen=True, slots=True)
class ReorderedTensor(MovedTensor):
    """A tensor whose source is not stored as it is read: copied to an unnamed temporary file while it is open.

    Attributes:
        source: The same elements, and perhaps more, in the order in which they are stored.
        strides: See StridedTensor; over the elements of ``source``.
        big_endian: Whether ``source`` gives the bytes of each element most significant first.
        dims: See StridedTensor.
        first: The index in ``source`` of this tensor's first element.
    """

    source: StoredTensor
    strides: tuple[int, ...]
    big_endian: bool = False
    dims: tuple[int, ...] = ()
    first: int = 0

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """The source."""
        return (self.source,)

    @property
    def reader_bytes(self) -> int:
        """The part of the copy that is read at a time, or the memory to make the copy."""
        return max(MOST_READ, self.source.reader_bytes + _PIECE)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading, in row-major, little-endian order."""
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
                    "Set TMPDIR to a folder with more space.",
                ) from error
            file = OpenFile(self.file.path, self.source.nbytes, copy.fileno())
            yield _gatherer(self, file, self.dtype.nbytes(self.first)).read


@dataclass(frozen=True, slots=True)
class _Gatherer:
    """Reads a strided tensor from an open file: for each piece, all bytes from its first to its last element.

    The file is not mapped into memory, as truncating a mapped file would crash the process.

    Attributes:
        tensor: The tensor.
        file: The open file.
        offset: The byte offset of the tensor's first element.
        element: The stored element type, with its byte order.
    """

    tensor: StridedTensor | ReorderedTensor
    file: OpenFile
    offset: int
    element: np.dtype[Any]

    def read(self, start: int, buffer: Buffer) -> None:
        """See Reader."""
        kept = zip(self.tensor.dims or self.tensor.shape, self.tensor.strides, strict=True)
        dims = [(size, stride) for size, stride in kept if size > 1] or [(1, 1)]
        self._copy(0, dims, start, np.frombuffer(buffer, _element(self.tensor.dtype, "<")))

    def _copy(self, first: int, dims: Sequence[tuple[int, int]], start: int, out: Array) -> None:
        """Copy elements of a view from index ``start`` on, in row-major order, until ``out`` is full.

        A view is described by its first element in the storage, and the size and stride of each dimension.
        """
        (_, stride), rest = dims[0], dims[1:]
        if not rest:
            self._move(first + start * stride, [(out.size, stride)], out)
            return
        row_size = math.prod(size for size, _ in rest)
        row, skipped = divmod(start, row_size)
        if skipped:
            count = min(row_size - skipped, out.size)
            self._copy(first + row * stride, rest, skipped, out[:count])
            row, out = row + 1, out[count:]
        rows = out.size // row_size
        if rows:
            whole = out[: rows * row_size].reshape(rows, *(size for size, _ in rest))
            self._move(first + row * stride, [(rows, stride), *rest], whole)
        if out.size > rows * row_size:
            self._copy(first + (row + rows) * stride, rest, 0, out[rows * row_size :])

    def _move(self, first: int, dims: Sequence[tuple[int, int]], out: Array) -> None:
        """Copy a whole view, split in halves until each spans few bytes."""
        if not out.size:
            return
        extent = extent_of(*zip(*dims, strict=True))
        if extent * self.element.itemsize > MOST_READ and out.size > 1:
            axis = max(range(len(dims)), key=lambda each: (dims[each][0] > 1, dims[each][1]))
            size, stride = dims[axis]
            for begin, end in ((0, size // 2), (size // 2, size)):
                half = [*dims[:axis], (end - begin, stride), *dims[axis + 1 :]]
                self._move(first + begin * stride, half, out[(slice(None),) * axis + (slice(begin, end),)])
            return
        self._fetch(first, dims, extent, out)

    def _fetch(self, first: int, dims: Sequence[tuple[int, int]], extent: int, out: Array) -> None:
        """Read a view that spans ``extent`` elements: as one run, or row by row if most of it is not needed."""
        axis = max(range(len(dims)), key=lambda each: dims[each][1])
        rows, pitch = dims[axis]
        width = extent - (rows - 1) * pitch  # The extent of a row.
        if rows == 1 or width * MOST_WASTED > pitch:
            rows, pitch, width = 1, extent, extent
        storage, itemsize = np.empty((rows, width), self.element), self.element.itemsize
        for row, part in enumerate(storage):
            position = self.offset + (first + row * pitch) * itemsize
            self.file.read(position, part.view(np.uint8).data)
        strides = [width if each == axis and rows > 1 else stride for each, (_, stride) in enumerate(dims)]
        steps = tuple(stride * itemsize for stride in strides)
        _copy_rows(as_strided(storage, tuple(size for size, _ in dims), steps, writeable=False), out)


def _gatherer(tensor: StridedTensor | ReorderedTensor, file: OpenFile, offset: int) -> _Gatherer:
    return _Gatherer(tensor, file, offset, _element(tensor.dtype, ">" if tensor.big_endian else "<"))


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The row-major strides of a contiguous tensor, in elements.

    >>> row_major((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def is_plain(dtype: DType, shape: tuple[int, ...], strides: tuple[int, ...], big_endian: bool) -> bool:
    """Whether elements are in row-major, little-endian order; dimensions of size one do not matter."""
    wanted = row_major(shape)
    ordered = all(size == 1 or step == want for size, step, want in zip(shape, strides, wanted, strict=True))
    return ordered and (not big_endian or dtype.bytes == 1)


def strided_tensor(
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
    """The number of elements of storage that a tensor spans; no dimension may be zero.

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


def _copy_rows(view: Array, out: Array) -> None:
    # Reading a transposed matrix along its rows touches a cache line for every element: narrow columns
    # keep those lines in the cache until the next rows need them.
    across = view.ndim > 1 and view.strides[-1] != view.itemsize and len(view) >= _TILE
    width = _TILE if across else view.shape[-1]
    for begin in range(0, view.shape[-1], width):
        out[..., begin : begin + width] = view[..., begin : begin + width]
