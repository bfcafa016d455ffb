"""How a tensor is cut into matrices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from modelfuse.methods.spec import Floats, WholeMatrix

Numbers = np.ndarray[Any, np.dtype[np.int64]]

#: Elements that methods of whole matrices write at a time. Fixed, as what is multiplied together decides the last bits.
SLICE = 1 << 20
#: Elements of a panel of rows, at least.
PANEL = 4 * SLICE


class MergedDifference(Protocol):
    """What a method makes of a tensor, known without the large matrices, as a product."""

    @property
    def memory(self) -> int:
        """Bytes that computing it takes."""

    def factors(self) -> tuple[Floats, Floats]:
        """Matrices of shape (rows, rank) and (rank, columns), before the factor on the difference."""


@dataclass(frozen=True)
class Matrices:
    """How the elements of a tensor, in row-major order, are matrices.

    Attributes:
        units: How many there are, one after another, such as experts.
        rows: The rows of each.
        columns: The columns of each.
        out_first: Whether rows are the outputs of a Linear layer, and columns its inputs.
        parts: The outputs of each layer that is kept in one, as runs: the first one and how many. Empty: all.
        merged: The merged difference, where it can be known without these matrices.
    """

    units: int
    rows: int
    columns: int
    out_first: bool = True
    parts: tuple[tuple[tuple[int, int], ...], ...] = ()
    merged: MergedDifference | None = None

    @property
    def unit(self) -> int:
        """The elements of each."""
        return self.rows * self.columns

    @property
    def window(self) -> int:
        """The most elements that are looked at together: a slice, and what is left of the rows at its ends."""
        return min(SLICE + 2 * self.columns, self.units * self.unit)

    @property
    def inputs(self) -> int:
        """The inputs of the layer."""
        return self.columns if self.out_first else self.rows

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
            name: ``smaller``, ``inputs`` or ``outputs``.
        """
        outputs, inputs = self.outputs[part].size, self.inputs
        of_inputs = name == "inputs" or (name == "smaller" and inputs <= outputs)
        return of_inputs == self.out_first, inputs if of_inputs else outputs


class MatrixPart:
    """Some rows or columns of a matrix that are a matrix themselves.

    Attributes:
        how: What is done to it.
        of_columns: Whether Gram matrices are of its columns.
        k: Of how many.
        inputs: The inputs of the layer.
        rows: Which rows of the matrix it has, ascending.
    """

    def __init__(self, matrices: Matrices, number: int, how: WholeMatrix, models: int) -> None:
        outputs = matrices.outputs[number]
        self.how = how.for_shape(outputs.size, matrices.inputs, models)
        self.of_columns, self.k = matrices.side(number, self.how.side)
        self.inputs = matrices.inputs
        self.rows = outputs if matrices.out_first else np.arange(matrices.rows)
        self.columns = np.arange(matrices.columns) if matrices.out_first else outputs

    def locate(self, first: int, stop: int) -> tuple[int, int, Any]:
        """Of some rows of the matrix, those of the part: their first number in it, their last, and where they are."""
        begin, end = np.searchsorted(self.rows, [first, stop])
        return int(begin), int(end), (run_of(self.rows[begin:end] - first), run_of(self.columns))

    def take(self, values: Floats, first: int) -> tuple[int, int, list[Floats]]:
        """The part's rows of a window, shape (matrices, rows, columns), that begins with a row of the matrix."""
        begin, end, (rows, columns) = self.locate(first, first + values.shape[1])
        return begin, end, [each[rows][:, columns] for each in values]


def run_of(numbers: Numbers) -> Any:
    """The same as a slice, if it can be one."""
    if numbers.size and numbers[-1] - numbers[0] + 1 == numbers.size:
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return numbers


def panel_of(k: int) -> int:
    """The elements of the result that are made together: with ``k``, of all ``k`` rows. A multiple of SLICE."""
    return max(k * k // SLICE, PANEL // SLICE) * SLICE if k else SLICE


def memory_of(matrices: Matrices, how: WholeMatrix, models: int) -> int:
    """The most bytes that a worker needs for a tensor, beside its buffers."""
    if matrices.merged is not None:
        return matrices.merged.memory + 8 * 4 * matrices.window
    parts = [MatrixPart(matrices, part, how, models) for part in range(len(matrices.outputs))]
    number, kept, most, panel, by_rows = 1, 0, 0, 0, 0
    for part in parts:
        own, grams = {"sum": (1, 1), "each": (models, models), "pairs": (models, models**2)}[part.how.gram]
        # Decompositions take as much as four matrices; methods of several Gram matrices hold them up to five times.
        square = part.k**2
        work = 4 + {"sum": 0, "each": 5 * own, "pairs": 4 * grams}[part.how.gram]
        most = max(most, kept + square * (grams + work), kept + square * (grams + 1) + max(square, PANEL) * own)
        kept += square * own
        number = max(number, own)
        by_rows = max(by_rows, 0 if part.of_columns else part.k)
        panel = max(panel, panel_of(by_rows) + 2 * matrices.columns)
    most = max(most, kept + 2 * panel)
    return 8 * (most + (number + 3) * matrices.window + SLICE)
