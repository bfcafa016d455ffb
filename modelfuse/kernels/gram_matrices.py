"""Gram matrices of models' matrices: room for them, how methods take them, and norms that they tell."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from modelfuse.kernels.matrices import MatrixPart
from modelfuse.methods.spec import Floats


def allocate_grams(part: MatrixPart, models: int) -> tuple[Floats, dict[tuple[int, int], Floats]]:
    """Room for Gram matrices, zero: as a method takes them, and by the numbers of their matrices."""
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
    """The models' weights with a mean of 1."""
    given = np.array(weights)
    with np.errstate(all="ignore"):
        even: Floats = given / given.mean()
    return even


def ratio(whole: float, made: float) -> float:
    """The norm of one relative to that of another, by their squares; of what is zero, any."""
    return math.sqrt(max(whole, 0.0) / made) if made > 0 else 1.0


def ratio_by_gram(grams: Floats, factors: Floats, kind: str, weights: Sequence[float]) -> float:
    """The norm of the sum of the differences, relative to that of what factors make of them.

    Args:
        grams: Of the weighted ``sum``, or of all ``pairs``.
        factors: K, one a matrix.
        kind: Which of both.
        weights: The models' weights, which in the sum have a mean of 1.
    """
    even = even_weights(weights)
    if kind == "sum":
        whole = float(np.trace(grams)) * (len(weights) / sum(weights)) ** 2
        return ratio(whole, float(np.vdot(factors[0], grams @ factors[0])))
    models = range(len(factors))
    whole = float(even @ np.trace(grams, axis1=2, axis2=3) @ even)
    return ratio(whole, sum(float(np.vdot(factors[i], grams[i, j] @ factors[j])) for i in models for j in models))
