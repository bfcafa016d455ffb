"""The measures that declarations may request: of whole tensors, or of each of their lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from modelfuse.methods.expressions import Expression

Floats = npt.NDArray[np.float64]


class Magnitudes(Protocol):
    """Measured magnitudes of one model's tensor."""

    @property
    def total(self) -> float:
        """Σ|x|, exact, rounded once; NaN if any is not finite."""

    def at(self, number: int) -> float:
        """The magnitude at the ``number``-th requested rank."""

    def between(self, first: int, last: int | None = None) -> float:
        """Σ|x| of the magnitudes from ``at(first)`` to ``at(last)``, or to the largest; exact, rounded once."""


class OrderStatistics(Struct, frozen=True, eq=False):
    """Measures the magnitudes at given ranks.

    Attributes:
        ranks: Maps the tensor's size and the model's settings to ranks, ascending from 0 (the smallest magnitude).
        numbers: Maps the size, the model's settings and its magnitudes to numbers for the element step, by name.
        sums: Maps the settings to whether ``numbers`` needs sums of magnitudes.
        of: For a combination: the expression of all models' elements whose magnitudes are measured. Settings are then
            those of the combination, with all numbers known so far. If each model has its own value of it, each has
            numbers of its own.
        nonzero: Whether ranks are among the magnitudes that are not zero; their number takes the place of the size.
        needed: Maps all settings to whether the measure is needed.
    """

    ranks: Callable[[int, Any], Sequence[int]]
    numbers: Callable[[int, Any, Magnitudes], Mapping[str, float]]
    sums: Callable[[Any], bool] = lambda settings: True
    of: Callable[[Any], Expression] | None = None
    nonzero: bool = False
    needed: Callable[[Any], bool] = lambda settings: True


class Ranks(Struct, frozen=True, eq=False):
    """Measures each magnitude's rank, on which the element step's probability ``keep`` depends.

    Attributes:
        probability: Maps ranks (float64, shape (ranks,); 0 is the largest magnitude), the tensor's size and the model's
            settings to probabilities (float64, shape (ranks,)). Must be linear in the rank.
        spread: Maps the model's settings to the difference between the probabilities of the largest and the smallest.
    """

    probability: Callable[[Floats, int, Any], Floats]
    spread: Callable[[Any], float]
    needed: Callable[[Any], bool] = lambda settings: True


class LineRanks(Struct, frozen=True, eq=False):
    """Measures each magnitude's rank within its line, on which the element step's probability ``keep`` depends.

    Attributes:
        axis: Maps the number of dimensions to the axis of the lines.
        probability: Maps ranks (float64, any shape; 0 is the smallest magnitude, equal magnitudes share their mean
            rank), the length of a line and the model's settings to probabilities (float64, the same shape).
        needed: Maps all settings to whether the measure is needed.
    """

    axis: Callable[[int], int]
    probability: Callable[[Floats, int, Any], Floats]
    needed: Callable[[Any], bool] = lambda settings: True


class Sums(Struct, frozen=True, eq=False):
    """Measures sums over the whole tensor, in compensated float64.

    Attributes:
        terms: Maps the namespace of ``element`` (for a combination, of ``combine``) to the expressions to sum, of each
            model or of all models.
        numbers: Maps the sums (float64, shape (models, terms)), the tensor's size and all settings to numbers by name,
            one per model.
        needed: Maps all settings to whether the measure is needed.
    """

    terms: Callable[[Any], Sequence[Expression]]
    numbers: Callable[[Floats, int, Any], Mapping[str, Sequence[float]]]
    needed: Callable[[Any], bool] = lambda settings: True


class Gram(Struct, frozen=True, eq=False):
    """Measures dot products of all pairs of models, after the sparsifier, in float64.

    Attributes:
        weights: Maps the Gram matrix (float64, shape (models, models)) and the settings to one factor per model.
        axis: Maps the settings to the axis of the lines whose products are measured, each line with factors of its own;
            None for products of whole tensors.
        needed: Maps all settings to whether the measure is needed.
    """

    weights: Callable[[Floats, Any], Sequence[float]]
    axis: Callable[[Any], int | None] = lambda settings: None
    needed: Callable[[Any], bool] = lambda settings: True


class Divergence(Struct, frozen=True, eq=False):
    """Measures each row's Kullback-Leibler divergence of the single model's softmax from the base's: ``divergence``.

    It is Σ p ln(p/q), with p and q the softmax over the row plus a small number.

    Attributes:
        least: That number.
        needed: Maps all settings to whether the measure is needed.
    """

    least: float
    needed: Callable[[Any], bool] = lambda settings: True
