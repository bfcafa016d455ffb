"""Interpolation along the arc between two models."""

from __future__ import annotations

import math
from collections.abc import Sequence

from modelfuse.methods.arrays import Array, scalar, total


def slerp(
    xs: Sequence[Array],
    *,
    slerp_alpha: float = 0.5,
    slerp_normalize_eps: float = 1e-8,
    slerp_dot_threshold: float = 0.9995,
) -> Array:
    """Spherical linear interpolation between exactly two models; straight where they are nearly parallel.

    Formula: sin((1−α)θ)/sin θ · x₁ + sin(αθ)/sin θ · x₂, with cos θ = x₁·x₂ / (‖x₁‖‖x₂‖)
    Paper: Shoemake 1985, Animating rotation with quaternion curves, SIGGRAPH

    Args:
        xs: The two models' tensors.
        slerp_alpha: 0 gives the first, 1 the second.
        slerp_normalize_eps: A tensor whose L2 norm is not above this is not normalised.
        slerp_dot_threshold: Above this |cos θ| the result is (1−α)x₁ + αx₂.
    """
    first, second = xs
    wide = [x.astype("float64") for x in xs]
    c1, c2 = coefficients(
        total(wide[0] * wide[0]),
        total(wide[1] * wide[1]),
        total(wide[0] * wide[1]),
        slerp_alpha,
        slerp_normalize_eps,
        slerp_dot_threshold,
    )
    return first * scalar(first, c1) + second * scalar(second, c2)


def coefficients(
    square_1: float, square_2: float, dot: float, alpha: float, eps: float, threshold: float
) -> tuple[float, float]:
    """The factors of x₁ and x₂, from the sums x₁·x₁, x₂·x₂ and x₁·x₂ over the whole tensor."""
    norms = [math.sqrt(square) for square in (square_1, square_2)]
    cosine = dot
    for norm in norms:
        cosine = cosine / norm if norm > eps else cosine
    if abs(cosine) > threshold:
        return 1 - alpha, alpha
    angle = math.acos(cosine) if -1 <= cosine <= 1 else math.nan
    if not (sine := math.sin(angle)):
        return 1 - alpha, alpha
    return math.sin((1 - alpha) * angle) / sine, math.sin(alpha * angle) / sine
