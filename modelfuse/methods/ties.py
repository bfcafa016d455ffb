"""Electing a sign for every element, and keeping the models that agree with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modelfuse.methods.arrays import Array, scalar

#: Where the agreeing weights sum to less than this, the sum is not divided by them.
MIN_DIVISOR = 1e-8


def ties(
    xs: Sequence[Array], weights: Sequence[float], *, ties_elect_type: str = "sum", normalize: bool = False
) -> Array:
    """The sum of the models whose sign, element by element, is the elected one.

    Formula: yᵢ = wᵢxᵢ; s = + where Σ yᵢ ≥ 0 (sum) or Σ sign yᵢ ≥ 0 (count), else −; Σ yᵢ over sign yᵢ = s, and
        with normalize ÷ Σ of their wᵢ
    Paper: Yadav et al. 2023, TIES-Merging, arXiv:2306.01708

    Args:
        xs: The models' tensors.
        weights: One weight a model.
        ties_elect_type: ``sum`` elects by value, ``count`` by number of models.
        normalize: Divide by the sum of the agreeing models' weights, where that is at least 1e-8 in size.
    """
    ys = [x * scalar(x, weight) for x, weight in zip(xs, weights, strict=True)]
    votes = ys if ties_elect_type == "sum" else [np.sign(y) for y in ys]
    elected = votes[0]
    for vote in votes[1:]:
        elected = elected + vote
    positive = elected >= 0
    result = np.zeros_like(xs[0])
    divisor = np.zeros_like(xs[0])
    for y, weight in zip(ys, weights, strict=True):
        agrees = np.where(positive, y > 0, y < 0)
        result = result + np.where(agrees, y, scalar(y, 0))
        divisor = divisor + np.where(agrees, scalar(y, weight), scalar(y, 0))
    if not normalize:
        return result
    divides = np.abs(divisor) >= scalar(divisor, MIN_DIVISOR)
    return result / np.where(divides, divisor, scalar(divisor, 1))
