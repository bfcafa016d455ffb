"""SLERP: spherical linear interpolation between two models."""

from __future__ import annotations

import math
from typing import Any

from modelfuse.methods.expressions import total
from modelfuse.methods.spec import Combination, Floats, Gram, Method, Parameter

ALPHA = Parameter(
    "slerp_alpha", 0.5, "slerp: 0 is the first model, 1 the second.", bounds={"ge": 0, "le": 1}, aliases=("t",)
)
NORMALIZE_EPS = Parameter("slerp_normalize_eps", 1e-8, "slerp: norms below this are not normalized.", bounds={"ge": 0})
DOT_THRESHOLD = Parameter(
    "slerp_dot_threshold", 0.9995, "slerp: above this cosine, interpolate linearly.", bounds={"ge": 0, "le": 1}
)


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


def _weights(gram: Floats, settings: Any) -> tuple[float, float]:
    return coefficients(
        float(gram[0, 0]), float(gram[1, 1]), float(gram[0, 1]),
        settings.slerp_alpha, settings.slerp_normalize_eps, settings.slerp_dot_threshold,
    )  # fmt: skip


SLERP = Combination(
    name="slerp",
    summary="Spherical linear interpolation between exactly two models; straight where they are nearly parallel.",
    formula="sin((1−α)θ)/sin θ · x₁ + sin(αθ)/sin θ · x₂, with cos θ = x₁·x₂ / (‖x₁‖‖x₂‖)",
    paper="Shoemake 1985, Animating rotation with quaternion curves, SIGGRAPH",
    measured="As task arithmetic, once λ is chosen.",
    parameters=(ALPHA, NORMALIZE_EPS, DOT_THRESHOLD),
    measures=(Gram(_weights),),
    models=(2, 2),
    weights="none",
    combine=lambda each: total(each.x * each.weight),
)

METHODS = (Method("slerp", SLERP),)
