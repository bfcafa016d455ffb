"""File reads inside kernels: a part of a slice at a time, which stays in the CPU's inner caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from modelfuse.dtypes import DType
from modelfuse.kernels import Extent, Unread
from modelfuse.kernels.jit.compile import Foreign, compile_kernel

Array = np.ndarray[Any, Any]

#: Bytes of all sources that are read at a time: each read costs a system call, and the bytes must fit into the L2
#: cache beside the kernels' buffers.
WINDOW = 1 << 18
#: Elements per block, which divides what is read at a time: few enough for the L1 cache, enough to make the cost of a
#: function call per block negligible.
BLOCK = 1024
#: Attempts of a read that fails: on some filesystems a signal may interrupt it.
ATTEMPTS = 3

_pread = Foreign("pread", "int64", "int32", "uintp", "int64", "int64")


class DirectReads(NamedTuple):
    """The files that a kernel reads a tensor's sources from.

    Attributes:
        descriptors: int64, shape (sources,): file descriptors.
        offsets: int64, shape (sources,): byte offset of the tensor in each file.
        widths: int64, shape (sources,): bytes per element.
        slice: int64, shape (3,): the index of the slice's first element; the number of elements that are read at a time
            (0: all elements are already in the rows); the source whose read failed, counted from 1 (0: none).
    """

    descriptors: Array
    offsets: Array
    widths: Array
    slice: Array

    @classmethod
    def of(cls, sources: int) -> DirectReads:
        """Arrays for ``sources`` sources, without files."""
        return cls(*(np.zeros(size, np.int64) for size in (sources, sources, sources, 3)))

    def read_from(self, extents: Sequence[Extent], dtypes: Sequence[DType]) -> None:
        """Set the extents and types of the sources."""
        self.descriptors[:], self.offsets[:] = zip(*extents, strict=True)
        self.widths[:] = [dtype.bytes for dtype in dtypes]
        self.slice[1] = max(WINDOW // int(self.widths.sum()) // BLOCK, 1) * BLOCK

    @contextmanager
    def at(self, first: int) -> Iterator[None]:
        """The context of a kernel call for the slice that begins with element ``first`` of the tensor.

        Raises:
            Unread: If a read failed.
        """
        self.slice[0] = first
        yield
        if self.slice[2]:
            raise Unread(int(self.slice[2]) - 1)


@compile_kernel
def column_of(files: DirectReads, raws: Array, start: int, length: int) -> int:
    """Read a block of all sources if it is not read yet; returns its first element's column in the rows.

    Args:
        files: The files.
        raws: uint8, shape (sources, bytes).
        start: The index of the block's first element in the slice; blocks must come in order.
        length: The number of elements in the slice.
    """
    window = files.slice[1]
    if window == 0:
        return start
    column: int = start % window
    if column == 0:
        for row in range(files.offsets.size):
            fill(files, raws, row, start, min(window, length - start), 0)
    return column


@compile_kernel
def block_of(files: DirectReads, raws: Array, row: int, start: int, count: int) -> int:
    """The same for a block of one source; blocks may come in any order."""
    if files.slice[1] == 0:
        return start
    fill(files, raws, row, start, count, 0)
    return 0


@compile_kernel
def fill(files: DirectReads, raws: Array, row: int, start: int, count: int, column: int) -> None:
    """Read elements of one source to its row, from the element ``column`` on."""
    width = files.widths[row]
    position, left = files.offsets[row] + (files.slice[0] + start) * width, count * width
    address = np.uint64(raws[row].ctypes.data + column * width)
    attempts = 0
    while left > 0:
        done = _pread(np.int32(files.descriptors[row]), address, left, position)
        if done > 0:
            address += np.uint64(done)
            position += done
            left -= done
            continue
        attempts += 1
        if done == 0 or attempts == ATTEMPTS:
            files.slice[2] = row + 1
            return
