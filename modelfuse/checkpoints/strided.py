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
#: What a system may map around a page that is touched: Linux up to a huge page, if the file is cached so.
_WINDOW = 1 << 21
#: Mapped pages count as resident memory: no more of them at a time than this, in a reader.
MOST_MAPPED = 16 << 20


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
    def reader_bytes(self) -> int:
        """Pages of the file that are mapped."""
        return MOST_MAPPED

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading; elements come out in row-major, little-endian order."""
        with self.file.open() as descriptor:
            yield _map(self, descriptor, self.offset).read


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
        """That of the source."""
        return self.source.held

    @property
    def reader_bytes(self) -> int:
        """Pages of the copy that are mapped, or what it takes to make it."""
        return max(MOST_MAPPED, self.source.reader_bytes + _PIECE)

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
            yield _map(self, copy.fileno(), self.dtype.nbytes(self.first)).read


@dataclass(frozen=True, slots=True)
class _Mapped:
    """A strided view of a mapped file, read piece by piece so that few of its pages are resident at a time."""

    memory: mmap.mmap
    view: Array
    element: np.dtype[Any]

    def read(self, start: int, buffer: Buffer) -> None:
        """As a Reader."""
        self._copy(self.view, start, np.frombuffer(buffer, self.element))

    def _copy(self, view: Array, start: int, out: Array) -> None:
        """Copy the elements of ``view`` from number ``start`` on, in row-major order, until ``out`` is full."""
        if view.ndim == 1:
            self._move(view[start : start + out.size], out)
            return
        row_size = math.prod(view.shape[1:])
        row, skipped = divmod(start, row_size)
        if skipped:
            count = min(row_size - skipped, out.size)
            self._copy(view[row], skipped, out[:count])
            row, out = row + 1, out[count:]
        rows = out.size // row_size
        if rows:
            self._move(view[row : row + rows], out[: rows * row_size].reshape(rows, *view.shape[1:]))
        rest = out[rows * row_size :]
        if rest.size:
            self._copy(view[row + rows], 0, rest)

    def _move(self, view: Array, out: Array) -> None:
        """Copy a view as large as ``out``, by halves until the pages of each are few; then let go of them."""
        if _mapped_by(view) > MOST_MAPPED and view.size > 1:
            axis = max(range(view.ndim), key=lambda each: (view.shape[each] > 1, view.strides[each]))
            middle = view.shape[axis] // 2
            for half in (slice(None, middle), slice(middle, None)):
                place = (slice(None),) * axis + (half,)
                self._move(view[place], out[place])
            return
        _copy_rows(view, out)
        if hasattr(mmap, "MADV_DONTNEED"):
            self.memory.madvise(mmap.MADV_DONTNEED)


def _mapped_by(view: Array) -> int:
    """About how many bytes of a mapped file become resident when a view is read."""
    steps = [(size, step) for size, step in zip(view.shape, view.strides, strict=True) if size > 1]
    near: int = view.itemsize + sum((size - 1) * step for size, step in steps if step < _WINDOW)
    windows: int = math.prod(size for size, step in steps if step >= _WINDOW)
    return (near // _WINDOW + 2) * _WINDOW * windows


def _map(tensor: StridedTensor | ReorderedTensor, descriptor: int, offset: int) -> _Mapped:
    """Map a tensor whose first element lies at an offset of an open file."""
    element = _element(tensor.dtype, ">" if tensor.big_endian else "<")
    dims, strides = tensor.dims or tensor.shape, tensor.strides
    extent = extent_of(dims, strides)
    begin = offset - offset % mmap.ALLOCATIONGRANULARITY
    length = offset - begin + extent * element.itemsize
    try:
        mapped = mmap.mmap(descriptor, length, access=mmap.ACCESS_READ, offset=begin)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{tensor.file.path}: tensor {tensor.name!r} cannot be mapped: {error}") from error
    storage = np.frombuffer(mapped, element, extent, offset - begin)
    kept = [(size, stride) for size, stride in zip(dims, strides, strict=True) if size > 1]
    shape = tuple(size for size, _ in kept) or (1,)
    steps = tuple(stride * element.itemsize for _, stride in kept) or (element.itemsize,)
    return _Mapped(mapped, as_strided(storage, shape, steps, writeable=False), _element(tensor.dtype, "<"))


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


def _copy_rows(view: Array, out: Array) -> None:
    # Reading a transposed matrix along its rows touches a cache line for every element: narrow columns
    # keep those lines in the cache until the next rows need them.
    across = view.ndim > 1 and view.strides[-1] != view.itemsize and len(view) >= _TILE
    width = _TILE if across else view.shape[-1]
    for begin in range(0, view.shape[-1], width):
        out[..., begin : begin + width] = view[..., begin : begin + width]
