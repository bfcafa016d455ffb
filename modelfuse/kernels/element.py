"""The parameters of the element step, and of expressions of all models' elements after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from msgspec import Struct, field

from modelfuse.kernels.lines import LineKeep
from modelfuse.kernels.order_statistics import RANKS
from modelfuse.methods.expressions import Expression

Array = np.ndarray[Any, Any]


class KeepTables(NamedTuple):
    """The probability of keeping each magnitude, for all models.

    Attributes:
        tables: A pair per model: the non-empty bins, as in :class:`Tally`, and their probabilities, float64;
            −(slot + 1) refers to a subtable.
        subtables: Probabilities by the next digit, for each bin that was tallied again, shape (bins, RANKS).
        levels: How often bins were tallied again.
        exact: For a small tensor, each element's probability instead: float64, shape (models, elements).
    """

    tables: list[tuple[Array, Array]]
    subtables: Array
    levels: int
    exact: Array | None = None


class Element(Struct, frozen=True):
    """The parameters of the element step for one tensor.

    Attributes:
        keys: The keys of the random streams, one per model.
        numbers: Numbers by name, one mapping per model.
        keep: Probabilities by rank, if the step uses any.
        lines: Probabilities by rank within lines, if the step uses any.
    """

    keys: Sequence[int] = ()
    numbers: Sequence[Mapping[str, float]] = ()
    keep: KeepTables = field(default_factory=lambda: KeepTables([], np.ones((0, RANKS)), 0))
    lines: LineKeep | None = None

    def table(self, names: Sequence[str], compute: str) -> Array:
        """The numbers of these names in the compute type, shape (models, names)."""
        return table_of(self.numbers, names, compute)


class Merged(NamedTuple):
    """An expression of all models' elements, with its parameters.

    Attributes:
        expression: The expression.
        element: The parameters of the element step.
        numbers: The combination's :class:`~modelfuse.kernels.procedures.Coefficients`.
        sums: Whether sums of its magnitudes are needed.
    """

    expression: Expression
    element: Element
    numbers: Any
    sums: bool


def table_of(each: Sequence[Mapping[str, float]], names: Sequence[str], compute: str) -> Array:
    """A table of the named numbers in the compute type, one row per mapping: shape (mappings, names)."""
    return np.array([[numbers[name] for name in names] for numbers in each], compute).reshape(len(each), len(names))
