"""Dequantize 8-bit floats: codes and block scales to float32."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from modelfuse.kernels.arrays import plain
from modelfuse.kernels.jit.compile import compile_kernel

Array = np.ndarray[Any, Any]


class Grid(NamedTuple):
    """The grid of block scales of a matrix, or of several stacked matrices.

    Attributes:
        rows: Rows of one matrix.
        columns: Columns of a matrix.
        block_rows: Rows per block; fewer at the lower edge.
        block_columns: Columns per block; fewer at the right edge.
    """

    rows: int
    columns: int
    block_rows: int
    block_columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """The number of blocks of one matrix: (down, across)."""
        return -(-self.rows // self.block_rows), -(-self.columns // self.block_columns)

    def row_of(self, element: int) -> int:
        """The index of an element's row of blocks, counted over all matrices."""
        matrix, row = divmod(element // self.columns, self.rows)
        return matrix * self.shape[0] + row // self.block_rows


@compile_kernel(plain=plain.expand)
def expand(codes: Array, values: Array, grid: Grid, scales: Array, first: int, out: Array) -> None:
    """Write value(code) × scale for a run of elements.

    Args:
        codes: uint8, shape (n,). May alias the last quarter of the bytes of ``out``: writes never overtake reads.
        values: float32, shape (256,): the value of each code.
        grid: The grid of scales.
        scales: float32, shape (rows of blocks, blocks across), from the first element's row of blocks on.
        first: The index of the first element in the tensor.
        out: float32, shape (n,).
    """
    block_rows = -(-grid.rows // grid.block_rows)
    top = first // grid.columns // grid.rows * block_rows + first // grid.columns % grid.rows // grid.block_rows
    done = 0
    while done < codes.size:
        row, column = (first + done) // grid.columns, (first + done) % grid.columns
        across = column // grid.block_columns
        scale = scales[row // grid.rows * block_rows + row % grid.rows // grid.block_rows - top, across]
        size = min(min((across + 1) * grid.block_columns, grid.columns) - column, codes.size - done)
        run, part = codes[done : done + size], out[done : done + size]
        for i in range(size):
            part[i] = values[np.uint64(run[i])] * scale
        done += size
