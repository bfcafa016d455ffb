"""How a tensor is split into the matrices that whole-matrix methods work on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from msgspec import Struct

from modelfuse.dtypes import DType
from modelfuse.methods.spec import Floats, WholeMatrix

Numbers = np.ndarray[Any, np.dtype[np.int64]]

#: Elements that whole-matrix methods write at a time. Fixed, as the shape of a product decides its last bits.
SLICE = 1 << 20
#: The least elements of a panel of rows.
PANEL = 4 * SLICE


class MergedDifference(Protocol):
    """What a method makes of a tensor, known without the large matrices, as a product."""

    @property
    def memory(self) -> int:
        """Bytes that computing it takes."""

    def factors(self) -> tuple[Floats, Floats]:
        """Matrices of shape (rows, rank) and (rank, columns), before the factor on the difference."""


class Readable(Protocol):
    """A tensor in a file, of which some elements can be read."""

    @property
    def dtype(self) -> DType:
        """Its type."""

    def open(self) -> AbstractContextManager[Callable[[int, Any], None]]:
        """Give what fills a buffer with the elements from a number on."""


class Matrices(Struct, frozen=True, dict=True):
    """How the elements of a tensor, in row-major order, form matrices.

    Attributes:
        units: The number of stacked matrices, such as experts.
        rows: Rows per matrix.
        columns: Columns per matrix.
        out_first: Whether rows are the outputs of the Linear layer and columns its inputs.
        parts: For fused layers, the outputs of each as runs: (first, number). Empty: one layer.
        merged: The merged difference, where it can be known without these matrices.
        grams: For methods that take given Gram matrices of inputs: one tensor per model, with its units in order.
    """

    units: int
    rows: int
    columns: int
    out_first: bool = True
    parts: tuple[tuple[tuple[int, int], ...], ...] = ()
    merged: MergedDifference | None = None
    grams: tuple[Readable, ...] = ()

    @property
    def unit(self) -> int:
        """Elements per matrix."""
        return self.rows * self.columns

    @property
    def window(self) -> int:
        """The most elements in memory at a time: a slice, extended to whole rows at its ends."""
        return min(SLICE + 2 * self.columns, self.units * self.unit)

    @property
    def inputs(self) -> int:
        """The inputs of the layer."""
        return self.columns if self.out_first else self.rows

    @cached_property
    def outputs(self) -> tuple[Numbers, ...]:
        """The indices of each part's outputs, ascending."""
        every = ((0, self.rows if self.out_first else self.columns),)
        parts = self.parts or (every,)
        return tuple(np.concatenate([np.arange(first, first + count) for first, count in part]) for part in parts)

    def side(self, part: int, name: str) -> tuple[bool, int]:
        """Whether Gram matrices of a part are those of its columns (else of its rows), and their size.

        Args:
            part: The index of the part.
            name: The side: ``smaller``, ``inputs`` or ``outputs``.
        """
        outputs, inputs = self.outputs[part].size, self.inputs
        of_inputs = name == "inputs" or (name == "smaller" and inputs <= outputs)
        return of_inputs == self.out_first, inputs if of_inputs else outputs


class MatrixPart:
    """One layer's rows or columns of a matrix, which are a matrix themselves.

    Attributes:
        how: The method's declaration for whole matrices.
        of_columns: Whether Gram matrices are those of the columns.
        k: The size of the Gram matrices.
        inputs: The inputs of the layer.
        rows: The indices of its rows in the matrix, ascending.
        columns: Those of its columns.
        height: The rows of the matrix.
        width: Its columns.
    """

    def __init__(self, matrices: Matrices, number: int, how: WholeMatrix, models: int) -> None:
        outputs = matrices.outputs[number]
        self.how = how.for_shape(outputs.size, matrices.inputs, models)
        self.of_columns, self.k = matrices.side(number, self.how.side)
        self.inputs, self.height, self.width = matrices.inputs, matrices.rows, matrices.columns
        self.rows = outputs if matrices.out_first else np.arange(matrices.rows)
        self.columns = np.arange(matrices.columns) if matrices.out_first else outputs

    def locate(self, first: int, stop: int) -> tuple[int, int, Any]:
        """The part's rows among rows of the matrix: first and last index in the part, and indices to select them."""
        begin, end = np.searchsorted(self.rows, [first, stop])
        return int(begin), int(end), (run_of(self.rows[begin:end] - first), run_of(self.columns))

    def take(self, values: Floats, first: int) -> tuple[int, int, list[Floats]]:
        """The part's rows in a window of shape (matrices, rows, columns) that starts at row ``first`` of the matrix."""
        begin, end, (rows, columns) = self.locate(first, first + values.shape[1])
        return begin, end, [each[rows][:, columns] for each in values]


def run_of(numbers: Numbers) -> Any:
    """Consecutive indices as a slice; others unchanged."""
    if numbers.size and numbers[-1] - numbers[0] + 1 == numbers.size:
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return numbers


def panel_of(k: int) -> int:
    """The elements of the result that are made together: with ``k``, of all ``k`` rows. A multiple of SLICE."""
    return max(k * k // SLICE, PANEL // SLICE) * SLICE if k else SLICE


class Demand(NamedTuple):
    """Elements that a worker holds for a tensor, beside its buffers.

    Attributes:
        solving: While factors are computed.
        kept: The factors of all parts.
        models: Matrices of a window that are held.
        by_rows: The size of the largest Gram matrix of rows.
    """

    solving: int
    kept: int
    models: int
    by_rows: int

    def holds(self, matrices: Matrices) -> bool:
        """Whether there is room for a whole matrix of the result, once factors are computed."""
        return self.kept + matrices.unit <= self.solving


def demand_of(matrices: Matrices, how: WholeMatrix, models: int) -> Demand:
    """What a method of whole matrices holds."""
    number, kept, most, by_rows = 1, 0, 0, 0
    for part in (MatrixPart(matrices, part, how, models) for part in range(len(matrices.outputs))):
        own, grams = {"sum": (1, 1), "pairs": (models, models**2)}.get(part.how.gram, (models, models))
        # Decompositions need the memory of four matrices; methods of several Gram matrices hold up to five copies.
        square = part.k**2
        work = 4 + {"sum": 0, "pairs": 4 * grams}.get(part.how.gram, 5 * own)
        most = max(most, kept + square * (grams + work), kept + square * (grams + 1) + max(square, PANEL) * own)
        kept += square * (own + part.how.fixed_order)
        number = max(number, own)
        by_rows = max(by_rows, 0 if part.of_columns else part.k)
    return Demand(most, kept, number, by_rows)


def memory_of(matrices: Matrices, how: WholeMatrix, models: int) -> int:
    """Peak memory in bytes of a worker for a tensor, beside its buffers."""
    if matrices.merged is not None:
        return matrices.merged.memory + 8 * 4 * matrices.window
    demand = demand_of(matrices, how, models)
    panel = min(panel_of(demand.by_rows) + 2 * matrices.columns, matrices.unit + SLICE)
    result = matrices.unit + min(2 * PANEL, matrices.unit) if demand.holds(matrices) else 2 * panel
    most = max(demand.solving, demand.kept + result)
    return 8 * (most + (demand.models + 3) * matrices.window + SLICE)
