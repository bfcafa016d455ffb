"""Codes of one byte to the values that they stand for."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from modelfuse.kernels.arrays import plain
from modelfuse.kernels.jit.compile import compile_kernel

Array = np.ndarray[Any, Any]


class Grid(NamedTuple):
    """Which scale an element has: one for every block of a matrix, or of several under one another.

    Attributes:
        rows: Rows of one matrix.
        columns: Its columns.
        block_rows: Rows of a block; those at the lower edge may be cut.
        block_columns: Columns of a block; those at the right edge may be cut.
    """

    rows: int
    columns: int
    block_rows: int
    block_columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """How many blocks a matrix has, down and across."""
        return -(-self.rows // self.block_rows), -(-self.columns // self.block_columns)

    def row_of(self, element: int) -> int:
        """The row of blocks that an element lies in, counted over all matrices."""
        matrix, row = divmod(element // self.columns, self.rows)
        return matrix * self.shape[0] + row // self.block_rows


@compile_kernel(plain=plain.expand)
def expand(codes: Array, values: Array, grid: Grid, scales: Array, first: int, out: Array) -> None:
    """Write code × scale for a run of elements.

    Args:
        codes: uint8, shape (n,). They may be the last quarter of the bytes of ``out``: what is written never
            overtakes what is still to be read.
        values: float32, shape (256,): what each code stands for.
        grid: Where the blocks lie.
        scales: float32, shape (rows of blocks, blocks across), from the row that the first element lies in.
        first: The number of the first element in the tensor.
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
