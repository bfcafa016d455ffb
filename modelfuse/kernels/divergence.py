"""Kullback-Leibler divergences of a model's rows from the base's: the procedure, and what its passes compute.

A row's softmax is the same whatever is subtracted from its elements; nothing is, unless some would overflow otherwise.
Elements are those of the model, then those of the base, in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from modelfuse.kernels import Pass, Work
from modelfuse.kernels.elementary import log
from modelfuse.kernels.lines import Accumulated, Lines, line_sums

Array = np.ndarray[Any, Any]

#: Rows with a magnitude above this have their largest element subtracted.
LARGE = 600.0


class RowSums(NamedTuple):
    """What a span finds of its rows; pieces of a row add up.

    Attributes:
        sums: The sums of exponentials of the model and of the base.
        extremes: For consecutive rows, the first one's index, and the largest magnitudes and elements: float64, shape
            (2, 2, rows).
    """

    sums: Accumulated
    extremes: list[tuple[int, Array]]


class RowTables(NamedTuple):
    """What is known of each row.

    Attributes:
        shifts: What is subtracted from the model's elements and the base's: float64, shape (2, rows).
        scales: One over the sums of their exponentials after that: the same shape.
        change: The difference between the logarithms of these sums without that: float64, shape (rows,).
    """

    shifts: Array
    scales: Array
    change: Array


class DivergencePasses(Protocol):
    """The passes of a backend."""

    def exponentials(self, work: Work, lines: Lines, shifts: Array) -> Pass:
        """Sums exponentials along rows; finds :class:`RowSums`."""

    def divergences(self, work: Work, lines: Lines, tables: RowTables, least: float) -> Pass:
        """Sums (p + least) · ln((p + least) / (q + least)) along rows; finds :class:`Accumulated`."""


def measure_divergence(work: Work, passes: DivergencePasses, lines: Lines, least: float) -> Any:
    """Σ p ln(p/q) of each row, at least 0; p and q are the softmax of the model and of the base, plus ``least``."""
    shifts = np.zeros((2, lines.number))
    found = yield passes.exponentials(work, lines, shifts)
    extremes = np.full((2, 2, lines.number), -np.inf)
    for first, own in (each for span in found for each in span.extremes):
        here = extremes[:, :, first : first + own.shape[2]]
        np.maximum(here, own, out=here)
    magnitudes, largest = extremes
    if (large := magnitudes > LARGE).any():
        shifts[large] = largest[large]
        found = yield passes.exponentials(work, lines, shifts)
    sums = line_sums([span.sums for span in found])
    with np.errstate(all="ignore"):
        change = (shifts[0] - shifts[1]) + log(sums[0] / sums[1])
        tables = RowTables(shifts, 1.0 / sums, change)
    found = yield passes.divergences(work, lines, tables, least)
    return np.maximum(line_sums(found)[0], 0.0)
