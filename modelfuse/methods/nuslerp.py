"""NuSLERP: spherical interpolation between two models, or their differences, by weights."""

from __future__ import annotations

import math
from typing import Any

from modelfuse.methods.expressions import total
from modelfuse.methods.spec import Combination, Floats, Gram, Method, Parameter

#: Lower bound of norms; weights whose sum is closer to zero than MIN_SUM count as equal.
MIN_NORM, MIN_SUM = 1e-7, 1e-6
#: Up to this squared sine of the angle, interpolate linearly.
MIN_SQUARED_SINE = 1e-16

FLATTEN = Parameter(
    "nuslerp_flatten", True, "nuslerp: one angle for a whole tensor, instead of one for each row or column."
)
ROW_WISE = Parameter(
    "nuslerp_row_wise", False, "nuslerp without nuslerp_flatten: angles of columns (axis 0) instead of rows."
)


def coefficients(gram: Floats, t: float) -> tuple[float, float]:
    """The factors of both models; ``t`` 0 is the first one."""
    norms = [max(math.sqrt(gram[model, model]), MIN_NORM) for model in (0, 1)]
    cosine = float(gram[0, 1]) / norms[0] / norms[1]
    if not 1 - cosine * cosine > MIN_SQUARED_SINE:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _axis(settings: Any) -> int | None:
    if settings.nuslerp_flatten:
        return None
    return 0 if settings.nuslerp_row_wise else -1


def _weights(gram: Floats, settings: Any) -> tuple[float, float]:
    first, second = settings.weights
    whole = first + second
    return coefficients(gram, 0.5 if abs(whole) < MIN_SUM else second / whole)


NUSLERP = Combination(
    name="nuslerp",
    summary="Spherical linear interpolation between two models, or their differences to a base, by their weights.",
    formula=(
        "sin((1−t)θ)/sin θ · x₁ + sin(tθ)/sin θ · x₂, with t = w₂/(w₁ + w₂) and cos θ = x₁·x₂ / (‖x₁‖‖x₂‖), of whole "
        "tensors, rows or columns"
    ),
    paper="Shoemake 1985, Animating rotation with quaternion curves, SIGGRAPH; Goddard 2024, mergekit's NuSLERP",
    measured="As task arithmetic, once λ is chosen.",
    parameters=(FLATTEN, ROW_WISE),
    measures=(Gram(_weights, _axis),),
    models=(2, 2),
    combine=lambda each: total(each.x * each.weight),
)

METHODS = (Method("nuslerp", NUSLERP),)
