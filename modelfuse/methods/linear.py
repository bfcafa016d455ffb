"""Weighted sums."""

from __future__ import annotations

from collections.abc import Sequence

from modelfuse.methods.arrays import Array, scalar


def linear(xs: Sequence[Array], weights: Sequence[float]) -> Array:
    """The weighted sum of the models, or of their deltas to the base (task arithmetic).

    Formula: Σ wᵢ·xᵢ
    Paper: Wortsman et al. 2022, Model soups, arXiv:2203.05482; Ilharco et al. 2022, Editing models with task
        arithmetic, arXiv:2212.04089

    Args:
        xs: The models' tensors, all of one shape, float32 or float64.
        weights: One weight a model.
    """
    total = xs[0] * scalar(xs[0], weights[0])
    for x, weight in zip(xs[1:], weights[1:], strict=True):
        total = total + x * scalar(x, weight)
    return total
