"""Gram matrices of the models' weight matrices: allocation, and norms computed from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from modelfuse.kernels.matrices import MatrixPart
from modelfuse.methods.spec import Floats

#: Kinds of Gram matrices that do not tell the norm of the sum of the models.
BY_MODEL = ("each", "given")


def allocate_grams(part: MatrixPart, models: int) -> tuple[Floats, dict[tuple[int, int], Floats]]:
    """Zero Gram matrices: as one array, as methods take them, and as views by the indices of their two matrices."""
    kind, k = part.how.gram, part.k
    if kind == "pairs":
        pairs = np.zeros((models, models, k, k))
        return pairs, {(i, j): pairs[i, j] for i in range(models) for j in range(models)}
    if kind == "sum":
        whole = np.zeros((k, k))
        return whole, {(0, 0): whole}
    every = np.zeros((models, k, k))
    return every, {(i, i): every[i] for i in range(models)}


def even_weights(weights: Sequence[float]) -> Floats:
    """The models' weights, scaled to a mean of 1."""
    given = np.array(weights)
    with np.errstate(all="ignore"):
        even: Floats = given / given.mean()
    return even


def ratio(whole: float, made: float) -> float:
    """The ratio of two norms, given their squares; any number if the second is zero."""
    return math.sqrt(max(whole, 0.0) / made) if made > 0 else 1.0


def ratio_by_gram(grams: Floats, factors: Floats, kind: str, weights: Sequence[float]) -> float:
    """The norm of the weighted sum of the differences, divided by that of the merged difference.

    Args:
        grams: The Gram matrix of the weighted ``sum``, or those of all ``pairs``.
        factors: The factor K that multiplies each matrix.
        kind: ``sum`` or ``pairs``.
        weights: The models' weights; the sum uses them scaled to a mean of 1.
    """
    even = even_weights(weights)
    if kind == "sum":
        whole = float(np.trace(grams)) * (len(weights) / sum(weights)) ** 2
        return ratio(whole, float(np.vdot(factors[0], grams @ factors[0])))
    models = range(len(factors))
    whole = float(even @ np.trace(grams, axis1=2, axis2=3) @ even)
    return ratio(whole, sum(float(np.vdot(factors[i], grams[i, j] @ factors[j])) for i in models for j in models))
