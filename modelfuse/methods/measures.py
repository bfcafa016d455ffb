"""What declarations measure: of whole tensors, or of each of their lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from modelfuse.methods.expressions import Expression

Floats = npt.NDArray[np.float64]


class Magnitudes(Protocol):
    """What is known of the magnitudes of one model's tensor, once they were measured."""

    @property
    def total(self) -> float:
        """Σ|x|, exact, rounded once; NaN if any is not finite."""

    def at(self, number: int) -> float:
        """The magnitude at one of the ranks that were asked for."""

    def between(self, first: int, last: int | None = None) -> float:
        """Σ|x| of the magnitudes from ``at(first)`` to ``at(last)``, or to the largest; exact, rounded once."""


@dataclass(frozen=True, eq=False)
class OrderStatistics:
    """Measures the magnitudes at given ranks.

    Attributes:
        ranks: Of a tensor's size and the model's settings: ranks from 0, the smallest magnitude's, on.
        numbers: Of the tensor's size, the model's settings and its magnitudes: numbers for the element step, by name.
        sums: Of the settings: whether ``numbers`` asks for sums of magnitudes.
        of: Of a combination: the element, made of all models', whose magnitudes are meant. Settings are then those of
            the combination, with all numbers known by then.
        needed: Of all settings: whether it is measured.
    """

    ranks: Callable[[int, Any], Sequence[int]]
    numbers: Callable[[int, Any, Magnitudes], Mapping[str, float]]
    sums: Callable[[Any], bool] = lambda settings: True
    of: Callable[[Any], Expression] | None = None
    needed: Callable[[Any], bool] = lambda settings: True


@dataclass(frozen=True, eq=False)
class Ranks:
    """Measures every magnitude's rank: the element step has a probability ``keep`` that depends on it.

    Attributes:
        probability: Of ranks from 0, the largest magnitude's, on (float64, shape (ranks,)), the tensor's size and
            the model's settings: float64, shape (ranks,). A linear function of the rank.
        spread: Of the model's settings: how far the probabilities of the largest and the smallest are apart.
    """

    probability: Callable[[Floats, int, Any], Floats]
    spread: Callable[[Any], float]
    needed: Callable[[Any], bool] = lambda settings: True


@dataclass(frozen=True, eq=False)
class LineRanks:
    """Measures every magnitude's rank in its line: the element step has a probability ``keep`` that depends on it.

    Attributes:
        axis: Of the number of dimensions: the axis that lines lie along.
        probability: Of ranks from 0, the smallest magnitude's, on (float64, any shape; equal magnitudes share their
            mean rank), a line's length and the model's settings: float64, the same shape.
        needed: Of all settings: whether it is measured.
    """

    axis: Callable[[int], int]
    probability: Callable[[Floats, int, Any], Floats]
    needed: Callable[[Any], bool] = lambda settings: True


@dataclass(frozen=True, eq=False)
class Sums:
    """Measures sums over the whole tensor, in float64, as good as exact.

    Attributes:
        terms: Of what ``element`` (of a combination: ``combine``) is given: the elements to add up, one a model or made
            of all of them.
        numbers: Of the sums (float64, shape (models, terms)), the tensor's size and all settings: numbers by name, one
            a model.
        needed: Of all settings: whether it is measured.
    """

    terms: Callable[[Any], Sequence[Expression]]
    numbers: Callable[[Floats, int, Any], Mapping[str, Sequence[float]]]
    needed: Callable[[Any], bool] = lambda settings: True


@dataclass(frozen=True, eq=False)
class Gram:
    """Measures the dot products of all pairs of models (of what is left of them by the sparsifier), in float64.

    Attributes:
        weights: Of the Gram matrix (float64, shape (models, models)) and the settings: one factor a model.
        axis: Of the settings: the axis along whose lines products are added up, each line having factors of its own;
            None for one product of whole tensors.
        needed: Of all settings: whether it is measured.
    """

    weights: Callable[[Floats, Any], Sequence[float]]
    axis: Callable[[Any], int | None] = lambda settings: None
    needed: Callable[[Any], bool] = lambda settings: True


@dataclass(frozen=True, eq=False)
class Divergence:
    """Measures, for each row, how far the only model's softmax is from the base's: ``divergence``, an element's factor.

    It is the Kullback-Leibler divergence Σ p ln(p/q), p and q the softmax over the row plus a small number.

    Attributes:
        least: That number.
        needed: Of all settings: whether it is measured.
    """

    least: float
    needed: Callable[[Any], bool] = lambda settings: True
