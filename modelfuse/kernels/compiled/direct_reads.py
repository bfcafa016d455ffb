"""Stored elements read by the kernels themselves: a part of a slice at a time, which stays in the nearer caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from modelfuse.dtypes import DType
from modelfuse.kernels import Extent, Unread
from modelfuse.kernels.jit.compile import Foreign, compile_kernel

Array = np.ndarray[Any, Any]

#: Bytes of all sources that are read at a time. Reading a little at a time costs a system call; in the second-level
#: cache there is room for these and for what the kernels keep.
WINDOW = 1 << 18
#: Elements a block, which divides what is read at a time: few enough for the nearest caches, enough that calling a
#: function for each costs nothing.
BLOCK = 1024
#: How often reading is tried where it fails: a signal may interrupt it on some filesystems.
ATTEMPTS = 3

_pread = Foreign("pread", "int64", "int32", "uintp", "int64", "int64")


class DirectReads(NamedTuple):
    """Where a tensor's elements lie.

    Attributes:
        descriptors: int64, shape (sources,): the files.
        offsets: int64, shape (sources,): where the tensor begins in each.
        widths: int64, shape (sources,): bytes of an element.
        slice: int64, shape (3,): the number of its first element, how many elements are read at a time (0: all of them
            are in the rows already), and the source that could not be read, from one on.
    """

    descriptors: Array
    offsets: Array
    widths: Array
    slice: Array

    @classmethod
    def of(cls, sources: int) -> DirectReads:
        """BlockBuffers for so many sources."""
        return cls(*(np.zeros(size, np.int64) for size in (sources, sources, sources, 3)))

    def read_from(self, extents: Sequence[Extent], dtypes: Sequence[DType]) -> None:
        """Read tensors of these types from there, from now on."""
        self.descriptors[:], self.offsets[:] = zip(*extents, strict=True)
        self.widths[:] = [dtype.bytes for dtype in dtypes]
        self.slice[1] = max(WINDOW // int(self.widths.sum()) // BLOCK, 1) * BLOCK

    @contextmanager
    def at(self, first: int) -> Iterator[None]:
        """While a kernel takes the slice that begins with this element of the tensor.

        Raises:
            Unread: If anything could not be read.
        """
        self.slice[0] = first
        yield
        if self.slice[2]:
            raise Unread(int(self.slice[2]) - 1)


@compile_kernel
def column_of(files: DirectReads, raws: Array, start: int, length: int) -> int:
    """Where the block that begins with an element of a slice lies in the rows, once it was read.

    Args:
        files: Where from.
        raws: uint8, shape (sources, bytes).
        start: The number of the block's first element in the slice: blocks come in order.
        length: The number of elements in the slice.
    """
    window = files.slice[1]
    if window == 0:
        return start
    column: int = start % window
    if column == 0:
        for row in range(files.offsets.size):
            fill(files, raws, row, start, min(window, length - start))
    return column


@compile_kernel
def block_of(files: DirectReads, raws: Array, row: int, start: int, count: int) -> int:
    """The same for a block of one source, in any order."""
    if files.slice[1] == 0:
        return start
    fill(files, raws, row, start, count)
    return 0


@compile_kernel
def fill(files: DirectReads, raws: Array, row: int, start: int, count: int) -> None:
    """Read elements of one source to the start of its row."""
    width = files.widths[row]
    position, left = files.offsets[row] + (files.slice[0] + start) * width, count * width
    address = np.uint64(raws[row].ctypes.data)
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
