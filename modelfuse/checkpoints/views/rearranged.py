"""Views of vectors and matrices: transposed, sliced, or several interleaved.

Creating a view copies nothing; elements are read from the original files.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np

from modelfuse.checkpoints.tensors import MovedTensor, Reader, StoredTensor
from modelfuse.checkpoints.views.strided import ReorderedTensor, StridedTensor, is_plain, row_major
from modelfuse.dtypes import DType
from modelfuse.storage.files import Buffer

#: Elements that are assembled at a time: enough for rows of a transposed matrix to share cache lines.
_BATCH = 1 << 20


def view(
    tensor: StoredTensor, shape: tuple[int, ...], dims: tuple[int, ...], steps: tuple[int, ...], first: int = 0
) -> StoredTensor:
    """Some elements of a vector or matrix in another order.

    Args:
        tensor: A tensor of one or two dimensions.
        shape: The shape of the result.
        dims: The dimensions of ``steps``, with as many elements as ``shape``, in the same order.
        steps: The stride along each of ``dims``, in elements of ``tensor`` in row-major order; each is along one
            dimension of ``tensor``.
        first: The index in ``tensor`` of the first element.
    """
    name, dtype, file = tensor.name, tensor.dtype, tensor.file
    if math.prod(shape) == 0:
        return StoredTensor(name, dtype, shape, file, 0)
    strides, big_endian = row_major(tensor.shape), False
    if isinstance(tensor, StridedTensor) and not tensor.dims:
        strides, big_endian = tensor.strides, tensor.big_endian
    elif type(tensor) is not StoredTensor:
        return ReorderedTensor(name, dtype, shape, file, tensor.offset, tensor, steps, False, dims, first)

    def position(step: int) -> int:
        """The distance in the file of elements with this distance in row-major order."""
        counts = divmod(step, tensor.shape[-1])[-len(strides) :]
        return sum(count * stride for count, stride in zip(counts, strides, strict=True))

    offset, placed = tensor.offset + dtype.nbytes(position(first)), tuple(position(step) for step in steps)
    if is_plain(dtype, dims, placed, big_endian):
        return StoredTensor(name, dtype, shape, file, offset)
    return StridedTensor(name, dtype, shape, file, offset, placed, big_endian, dims)


@dataclass(frozen=True, slots=True)
class WovenTensor(MovedTensor):
    """Several tensors side by side: each row is the concatenation of that row of all parts.

    Attributes:
        parts: The tensors, of one type.
        rows: The number of rows that each part is split into, whatever its shape.
    """

    parts: tuple[StoredTensor, ...]
    rows: int

    @property
    def reader_bytes(self) -> int:
        """What reading one of its parts takes, and rows of it."""
        return max(part.reader_bytes for part in self.parts) + min(self.nbytes, self.dtype.nbytes(_BATCH))

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """The parts."""
        return self.parts

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open all parts for reading."""
        with ExitStack() as stack:
            readers = [stack.enter_context(part.open()) for part in self.parts]
            yield _Weaver(readers, [part.size // self.rows for part in self.parts], self.dtype).read


class _Weaver:
    """Reads a WovenTensor from its parts' readers; ``widths`` are the elements of one row of each."""

    def __init__(self, readers: list[Reader], widths: list[int], dtype: DType) -> None:
        self._readers, self._widths, self._dtype = readers, widths, dtype
        self._edges = list(itertools.pairwise([0, *itertools.accumulate(widths)]))

    def read(self, start: int, buffer: Buffer) -> None:
        whole = self._edges[-1][1]
        while len(buffer):
            row, skipped = divmod(start, whole)
            left = len(buffer) // self._dtype.bytes
            if skipped or left < whole:
                count = min(whole - skipped, left)
                self._read_piece(row, skipped, buffer[: self._dtype.nbytes(count)])
            else:
                rows = min(left // whole, max(_BATCH // whole, 1))
                count = rows * whole
                self._read_rows(row, rows, buffer[: self._dtype.nbytes(count)])
            start, buffer = start + count, buffer[self._dtype.nbytes(count) :]

    def _read_piece(self, row: int, skipped: int, buffer: Buffer) -> None:
        """A piece of one row, from where so many elements are skipped."""
        end = skipped + len(buffer) // self._dtype.bytes
        for reader, width, (left, right) in zip(self._readers, self._widths, self._edges, strict=True):
            begin, stop = max(left, skipped), min(right, end)
            if begin < stop:
                part = slice(self._dtype.nbytes(begin - skipped), self._dtype.nbytes(stop - skipped))
                reader(row * width + begin - left, buffer[part])

    def _read_rows(self, row: int, rows: int, buffer: Buffer) -> None:
        """So many whole rows."""
        out = np.frombuffer(buffer, np.uint8).reshape(rows, -1)
        for reader, width, (left, right) in zip(self._readers, self._widths, self._edges, strict=True):
            part = np.empty((rows, self._dtype.nbytes(width)), np.uint8)
            reader(row * width, part.reshape(-1).data)
            out[:, self._dtype.nbytes(left) : self._dtype.nbytes(right)] = part
