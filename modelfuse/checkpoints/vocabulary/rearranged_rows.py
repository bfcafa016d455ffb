"""Embeddings and heads with rows from several inputs, read from the original files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.adapters.arrays import Array, Recent, read_values
from modelfuse.checkpoints.tensors import MovedTensor, Reader
from modelfuse.checkpoints.views.rearranged import view
from modelfuse.checkpoints.vocabulary.row_maps import MEAN, ZEROS, RowMap
from modelfuse.dtypes import computed_in
from modelfuse.storage.files import Buffer

#: Elements of one input that are read at a time for computing means.
PIECE = 1 << 18


@dataclass(frozen=True, slots=True)
class RowsTensor(MovedTensor):
    """A matrix or vector with rows of other tensors.

    Attributes:
        own: The input's tensor that it replaces.
        parts: The source tensors, by index of the input.
        row_map: The source of each row.
        recent: A cache of the mean of all rows.
    """

    own: StoredTensor
    parts: Mapping[int, StoredTensor] = field(hash=False)
    row_map: RowMap
    recent: Recent = field(compare=False, repr=False)

    @property
    def width(self) -> int:
        """Elements per row."""
        return self.size // len(self.row_map)

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """The input's own tensor first, as types are its own."""
        return (self.own, *(part for part in self.parts.values() if part is not self.own))

    @property
    def reader_bytes(self) -> int:
        """What reading one of its parts takes, and some of its rows as numbers."""
        most = max(part.reader_bytes for part in self.made_of)
        computed = self.row_map.padding or self.row_map.means or any(each.dtype != self.dtype for each in self.made_of)
        return most + (3 * 8 * max(PIECE, self.width) if computed else 0)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open all parts for reading."""
        with ExitStack() as stack:
            readers = {number: stack.enter_context(part.open()) for number, part in self.parts.items()}
            yield _RowReader(self, readers).read


def rearranged(number: int, tensors: Mapping[int, StoredTensor], row_map: RowMap, axis: int = 0) -> StoredTensor:
    """The tensor of an input with its rows in the order of the output's vocabulary.

    Args:
        number: The index of the input.
        tensors: The source tensors, by index of the input.
        row_map: The source of each row.
        axis: The axis of the vocabulary: 1 for a head that is stored transposed.
    """
    own = tensors[number]
    if row_map.is_identity(number, own.shape[axis]):
        return own
    if axis == 1:
        turned = {each: _transposed(tensor) for each, tensor in tensors.items()}
        return _transposed(rearranged(number, turned, row_map))
    used = {each: tensors[each] for each in row_map.donors}
    dtype = own.dtype
    if row_map.padding or row_map.means or any(tensor.dtype != dtype for tensor in used.values()):
        dtype = computed_in(dtype, *(tensor.dtype for tensor in used.values()))
    shape = (len(row_map), *own.shape[1:])
    return RowsTensor(own.name, dtype, shape, own.file, own.offset, own, used, row_map, Recent(1))


def _transposed(tensor: StoredTensor) -> StoredTensor:
    rows, columns = tensor.shape
    return view(tensor, (columns, rows), (columns, rows), (1, columns))


class _RowReader:
    """Reads a RowsTensor; consecutive rows of one input are read as one run."""

    def __init__(self, tensor: RowsTensor, readers: Mapping[int, Reader]) -> None:
        self._tensor, self._readers = tensor, readers
        self._inputs, self._rows = tensor.row_map.inputs, tensor.row_map.rows
        step = np.where(self._inputs[1:] >= 0, 1, 0)
        follows = (self._inputs[1:] == self._inputs[:-1]) & (self._rows[1:] - self._rows[:-1] == step)
        #: The starts of the runs, and the end of the last one.
        self._begins = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(self._inputs)]

    def read(self, start: int, buffer: Buffer) -> None:
        """See Reader."""
        dtype, width = self._tensor.dtype, self._tensor.width
        while len(buffer):
            row, skipped = divmod(start, width)
            end = self._end(row)
            count = min((end - row) * width - skipped, len(buffer) // dtype.bytes)
            piece, buffer = buffer[: dtype.nbytes(count)], buffer[dtype.nbytes(count) :]
            self._read_run(row, skipped, piece)
            start += count

    def _end(self, row: int) -> int:
        """The end of the run that a row is in; of rows that are means, one is one."""
        if row >= len(self._inputs) or self._inputs[row] == MEAN:
            return row + 1
        return self._begins[bisect_right(self._begins, row)]

    def _read_run(self, row: int, skipped: int, out: Buffer) -> None:
        """Elements of one run, from so many of its first row on."""
        tensor, width = self._tensor, self._tensor.width
        count = len(out) // tensor.dtype.bytes
        if row >= len(self._inputs):
            self._put(out, self._mean_of_all()[skipped : skipped + count])
        elif self._inputs[row] == ZEROS:
            np.frombuffer(out, np.uint8)[:] = 0
        elif self._inputs[row] == MEAN:
            of = tensor.row_map.means[row]
            parts = [self._values(number, each * width + skipped, count).astype(np.float64) for number, each in of]
            self._put(out, np.sum(parts, axis=0) / len(parts))
        else:
            self._copy(int(self._inputs[row]), int(self._rows[row]) * width + skipped, out)

    def _copy(self, number: int, start: int, out: Buffer) -> None:
        dtype = self._tensor.dtype
        if self._tensor.parts[number].dtype == dtype:
            self._readers[number](start, out)
            return
        for begin in range(0, len(out) // dtype.bytes, PIECE):
            piece = out[dtype.nbytes(begin) : dtype.nbytes(begin + PIECE)]
            self._put(piece, self._values(number, start + begin, len(piece) // dtype.bytes))

    def _values(self, number: int, start: int, count: int) -> Array:
        return read_values(self._readers[number], self._tensor.parts[number].dtype, start, count)

    def _put(self, out: Buffer, values: Array) -> None:
        """Values in the tensor's type, which computes in itself."""
        np.frombuffer(out, self._tensor.dtype.compute)[:] = values

    def _mean_of_all(self) -> Array:
        """The mean of all rows except the padding; computed once, in the order of the rows."""
        mean: Array = self._tensor.recent.get(self._tensor.row_map, self._compute_mean)
        return mean

    def _compute_mean(self) -> Array:
        tensor, width, rows = self._tensor, self._tensor.width, len(self._inputs)
        total, several = np.zeros(width, np.float64), max(PIECE // max(width, 1), 1)
        kind = np.dtype(tensor.dtype.compute)
        for row in range(0, rows, several):
            values = np.empty((min(several, rows - row), width), kind)
            self.read(row * width, values.reshape(-1).view(np.uint8).data)
            total += values.sum(axis=0, dtype=np.float64)
        return total / rows
