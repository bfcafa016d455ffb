"""How a tensor is cut into matrices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from modelfuse.methods.spec import Floats, WholeMatrix

Numbers = np.ndarray[Any, np.dtype[np.int64]]

#: Elements that methods of whole matrices write at a time. Fixed, as what is multiplied together decides the last bits.
SLICE = 1 << 20
#: Elements of a panel of rows, at least.
PANEL = 4 * SLICE


@dataclass(frozen=True)
class Matrices:
    """How the elements of a tensor, in row-major order, are matrices.

    Attributes:
        units: How many there are, one after another, such as experts.
        rows: The rows of each.
        columns: The columns of each.
        out_first: Whether rows are the outputs of a Linear layer, and columns its inputs.
        parts: The outputs of each layer that is kept in one, as runs: the first one and how many. Empty: all.
    """

    units: int
    rows: int
    columns: int
    out_first: bool = True
    parts: tuple[tuple[tuple[int, int], ...], ...] = ()

    @property
    def unit(self) -> int:
        """The elements of each."""
        return self.rows * self.columns

    @property
    def window(self) -> int:
        """The most elements that are looked at together: a slice, and what is left of the rows at its ends."""
        return min(SLICE + 2 * self.columns, self.units * self.unit)

    @cached_property
    def outputs(self) -> tuple[Numbers, ...]:
        """The outputs of each part, ascending."""
        every = ((0, self.rows if self.out_first else self.columns),)
        parts = self.parts or (every,)
        return tuple(np.concatenate([np.arange(first, first + count) for first, count in part]) for part in parts)

    def side(self, part: int, name: str) -> tuple[bool, int]:
        """Whether Gram matrices of a part are of its columns, and of how many of them, else of its rows.

        Args:
            part: Its number.
            name: ``smaller`` or ``inputs``.
        """
        outputs = self.outputs[part].size
        inputs = self.columns if self.out_first else self.rows
        of_inputs = name == "inputs" or inputs <= outputs
        return of_inputs == self.out_first, inputs if of_inputs else outputs


class Part:
    """Some rows or columns of a matrix that are a matrix themselves.

    Attributes:
        of_columns: Whether Gram matrices are of its columns.
        k: Of how many.
        rows: Which rows of the matrix it has, ascending.
    """

    def __init__(self, matrices: Matrices, number: int, side: str) -> None:
        self.of_columns, self.k = matrices.side(number, side)
        outputs = matrices.outputs[number]
        self.rows = outputs if matrices.out_first else np.arange(matrices.rows)
        self.columns = np.arange(matrices.columns) if matrices.out_first else outputs

    def place(self, first: int, stop: int) -> tuple[int, int, Any]:
        """Of some rows of the matrix, those of the part: their first number in it, their last, and where they are."""
        begin, end = np.searchsorted(self.rows, [first, stop])
        return int(begin), int(end), (_run(self.rows[begin:end] - first), _run(self.columns))

    def take(self, values: Floats, first: int) -> tuple[int, int, list[Floats]]:
        """The part's rows of a window, shape (matrices, rows, columns), that begins with a row of the matrix."""
        begin, end, (rows, columns) = self.place(first, first + values.shape[1])
        return begin, end, [each[rows][:, columns] for each in values]


def _run(numbers: Numbers) -> Any:
    """The same as a slice, if it can be one."""
    if numbers.size and numbers[-1] - numbers[0] + 1 == numbers.size:
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return numbers


def panel_of(k: int) -> int:
    """The elements of the result that are made together: with ``k``, of all ``k`` rows. A multiple of SLICE."""
    return max(k * k // SLICE, PANEL // SLICE) * SLICE if k else SLICE


def memory_of(matrices: Matrices, how: WholeMatrix, models: int) -> int:
    """The most bytes that a worker needs for a tensor, beside its buffers."""
    number, grams = {"sum": (1, 1), "each": (models, models), "pairs": (models, models**2)}[how.gram]
    sides = [matrices.side(part, how.side) for part in range(len(matrices.outputs))]
    squares, most = [k * k for _, k in sides], max(k * k for _, k in sides)
    by_rows = [k for of_columns, k in sides if not of_columns]
    # Decompositions take as much as four matrices; panels and products beside Gram matrices are smaller.
    solving = sum(squares) * number + most * (grams + max(4, 2 * number))
    block = panel_of(max(by_rows, default=0)) + 2 * matrices.columns
    panel = max(most, PANEL) * number
    emitting = sum(squares) * number + 2 * block
    measuring = sum(squares[:-1]) * number + most * (grams + 1) + panel
    return 8 * (max(solving, emitting, measuring) + (number + 3) * matrices.window + SLICE)
