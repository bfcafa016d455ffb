"""Low-rank products, any run of their elements at a time.

Each element is Σₖ left[row, k]·right[k, column], summed over k in order with one rounding per operation, then scaled.
So its bits do not depend on which elements are computed together, as they would with a BLAS library's blocking.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from modelfuse.kernels.arrays import plain
from modelfuse.kernels.jit.compile import compile_kernel

Array = np.ndarray[Any, np.dtype[Any]]

#: Columns per block: the sums of a row stay in the L1 cache, ``right``'s block in the L2 cache.
BLOCK = 1024


def low_rank(left: Array, right: Array, scale: float) -> Array:
    """The whole product scale · left · right in the arrays' type, shape (rows, columns)."""
    total: Array = np.zeros((len(left), right.shape[1]), left.dtype)
    for k in range(len(right)):
        total += left[:, k : k + 1] * right[k]
    total *= left.dtype.type(scale)
    return total


def add_low_rank(left: Array, right: Array, scale: Any, first: int, out: Array) -> None:
    """Add the product's elements from index ``first`` on to ``out``, in row-major order.

    Args:
        left: float32 or float64, shape (rows, rank), contiguous.
        right: The same type, shape (rank, columns), contiguous.
        scale: A number of that type.
        first: The index of the first element.
        out: The same type, shape (elements,).
    """
    _add_low_rank(left, right, scale, first, np.empty(BLOCK, left.dtype), out)


@compile_kernel(plain=plain.add_low_rank)
def _add_low_rank(left: Array, right: Array, scale: Any, first: int, sums: Array, out: Array) -> None:
    columns = right.shape[1]
    row, skipped = first // columns, first % columns
    done = 0
    if skipped:
        done = min(columns - skipped, out.size)
        _add_rows(left, right, scale, row, 1, skipped, done, sums, out[:done])
        row += 1
    rows = (out.size - done) // columns
    if rows:
        _add_rows(left, right, scale, row, rows, 0, columns, sums, out[done : done + rows * columns])
        row, done = row + rows, done + rows * columns
    if done < out.size:
        _add_rows(left, right, scale, row, 1, 0, out.size - done, sums, out[done:])


@compile_kernel
def _add_rows(
    left: Array, right: Array, scale: Any, row: int, rows: int, column: int, columns: int, sums: Array, out: Array
) -> None:
    """The same for a rectangle; ``out`` has shape (rows · columns,), ``sums`` is scratch for a block."""
    rank = left.shape[1]
    for begin in range(0, columns, BLOCK):
        size = min(BLOCK, columns - begin)
        for i in range(rows):
            factors = left[row + i]
            sums[:size] = 0
            k = 0
            while k + 4 <= rank:  # Four at a time, in the same order: fewer loads and stores of the sums.
                a, b, c, d = factors[k], factors[k + 1], factors[k + 2], factors[k + 3]
                w = right[k, column + begin : column + begin + size]
                x = right[k + 1, column + begin : column + begin + size]
                y = right[k + 2, column + begin : column + begin + size]
                z = right[k + 3, column + begin : column + begin + size]
                for j in range(size):
                    sums[j] = (((sums[j] + a * w[j]) + b * x[j]) + c * y[j]) + d * z[j]
                k += 4
            while k < rank:
                a = factors[k]
                w = right[k, column + begin : column + begin + size]
                for j in range(size):
                    sums[j] += a * w[j]
                k += 1
            target = out[i * columns + begin : i * columns + begin + size]
            for j in range(size):
                target[j] += sums[j] * scale
