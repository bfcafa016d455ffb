"""Products of float64 matrices whose bits are the same on any processor.

Each element is the sum of its products in their order, with one rounding per operation: no fused multiply-add, no
blocking of the sum, whatever the width of the processor's vectors. Sums of a tile of the result stay in registers
(:class:`modelfuse.kernels.jit.tile.Tile`), over operands that are packed into what a tile needs next.

On an AMD EPYC of 2024 this takes 0.65 of the time of OpenBLAS, which uses half of the width of its vectors, and about
as long as OpenBLAS with that width. Where a processor adds and multiplies with the units that also fuse both, it is
twice as long at best.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from modelfuse.kernels.jit.code_cache import has_wide_vectors
from modelfuse.kernels.jit.compile import compile_kernel
from modelfuse.kernels.jit.tile import Tile

Array = np.ndarray[Any, np.dtype[np.float64]]

#: Rows of ``left`` and columns of ``right`` that are packed at a time, and how much of the sums.
ROWS, COLUMNS, DEPTH = 96, 512, 256


class Strided(NamedTuple):
    """A matrix: all elements from its first to its last one, and the steps between rows and between columns."""

    elements: Array
    row: int
    column: int


#: The tile that fits this processor's registers.
TILE = Tile(8, 2, 8) if has_wide_vectors() else Tile(4, 3, 4)
HEIGHT, WIDTH = TILE.rows, TILE.columns


def add_product(left: Array, right: Array, out: Array) -> None:
    """Add left · right to ``out``, whose rows are contiguous. Strides are not negative."""
    (rows, depth), columns = left.shape, right.shape[1]
    if rows and columns and depth:
        a, b = np.empty((ROWS + HEIGHT) * DEPTH), np.empty((COLUMNS + WIDTH) * DEPTH)
        x, y, z = (_strided(each) for each in (left, right, out))
        _add(x, y, z, rows, columns, depth, a, b, np.zeros(HEIGHT * WIDTH))


def _add_plainly(left: Strided, right: Strided, out: Strided, rows: int, columns: int, depth: int, *_: Array) -> None:
    """The same by numpy: one term of all sums after the other."""
    ones, others, target = (
        np.lib.stride_tricks.as_strided(each.elements, shape, (8 * each.row, 8 * each.column))
        for each, shape in ((left, (rows, depth)), (right, (depth, columns)), (out, (rows, columns)))
    )
    for k in range(depth):
        target += ones[:, k : k + 1] * others[k]


@compile_kernel(plain=_add_plainly)
def _add(
    left: Strided, right: Strided, out: Strided, rows: int, columns: int, depth: int, a: Array, b: Array, sums: Array
) -> None:
    for first in range(0, columns, COLUMNS):
        last = min(first + COLUMNS, columns)
        for begin in range(0, depth, DEPTH):
            deep = min(DEPTH, depth - begin)
            for x in range(first, last, WIDTH):
                start, to = begin * right.row + x * right.column, b[(x - first) * deep :]
                _pack(right.elements, start, right.row, right.column, deep, min(WIDTH, last - x), WIDTH, to)
            for top in range(0, rows, ROWS):
                bottom = min(top + ROWS, rows)
                for y in range(top, bottom, HEIGHT):
                    start, to = y * left.row + begin * left.column, a[(y - top) * deep :]
                    _pack(left.elements, start, left.column, left.row, deep, min(HEIGHT, bottom - y), HEIGHT, to)
                for x in range(first, last, WIDTH):
                    for y in range(top, bottom, HEIGHT):
                        high, wide, start = min(HEIGHT, bottom - y), min(WIDTH, last - x), y * out.row + x
                        _copy(out.elements, start, out.row, sums, 0, WIDTH, high, wide)
                        TILE(a, (y - top) * deep, b, (x - first) * deep, sums, deep)
                        _copy(sums, 0, WIDTH, out.elements, start, out.row, high, wide)


@compile_kernel
def _pack(elements: Array, start: int, along: int, across: int, deep: int, wide: int, size: int, to: Array) -> None:
    """Copy ``deep`` rows of ``wide`` elements, filled up with zeros to ``size``."""
    place = 0
    for _ in range(deep):
        if wide == size:
            for j in range(size):
                to[place + j] = elements[start + j * across]
        else:
            for j in range(size):
                to[place + j] = elements[start + j * across] if j < wide else 0.0
        place, start = place + size, start + along


@compile_kernel
def _copy(elements: Array, start: int, step: int, to: Array, place: int, stride: int, high: int, wide: int) -> None:
    """Copy a tile."""
    if wide == WIDTH:
        for i in range(high):
            for j in range(WIDTH):
                to[place + i * stride + j] = elements[start + i * step + j]
    else:
        for i in range(high):
            for j in range(wide):
                to[place + i * stride + j] = elements[start + i * step + j]


def _strided(matrix: Array) -> Strided:
    rows, columns = (each // 8 for each in matrix.strides)
    size = (matrix.shape[0] - 1) * rows + (matrix.shape[1] - 1) * columns + 1
    return Strided(np.lib.stride_tricks.as_strided(matrix, (size,), (8,)), rows, columns)
