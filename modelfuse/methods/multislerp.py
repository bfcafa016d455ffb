"""Multi-SLERP: the mean direction of any number of models, with their mean norm."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from modelfuse.methods.expressions import total
from modelfuse.methods.parameters import NORMALIZE
from modelfuse.methods.spec import Combination, Floats, Gram, Method, Parameter

EPS = Parameter("multislerp_eps", 1e-8, "multislerp: added to norms, and the least norm of the mean.", bounds={"gt": 0})


def coefficients(gram: Floats, weights: tuple[float, ...], eps: float) -> list[float]:
    """One factor per model.

    The models' unit tensors are projected onto the tangent plane at their mean m, and the exponential map of the mean
    projection T is taken. As m is their own mean, T = 0: what remains is m·cos ‖T‖, with ‖T‖ = eps.

    Raises:
        ValueError: If more than two models cancel each other.
    """
    if len(weights) == 1:
        return [1.0]
    own = np.array(weights)
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    if not norms.any():  # A tensor that no model changed is the base's.
        return [0.0] * len(weights)
    units = own / (norms + eps)
    mean = math.sqrt(max(float(units @ gram @ units), 0.0))
    if mean < eps:
        if len(weights) > 2:
            raise ValueError("multislerp: the models' weighted directions cancel, so there is no mean direction")
        return list(weights)
    factors: list[float] = (units / mean * math.cos(eps) * float(own @ norms)).tolist()
    return factors


def _weights(gram: Floats, settings: Any) -> list[float]:
    return coefficients(gram, settings.weights, settings.multislerp_eps)


MULTISLERP = Combination(
    name="multislerp",
    summary="The normalised weighted mean of the models' directions, times the weighted mean of their norms.",
    formula="m/‖m‖ · cos ε · Σ wᵢ‖xᵢ‖, with m = Σ wᵢ xᵢ/(‖xᵢ‖ + ε); Σ wᵢxᵢ for two models where ‖m‖ < ε",
    paper="Buss and Fillmore 2001, Spherical averages, ACM Transactions on Graphics 20(2), in its first step",
    measured="As task arithmetic; a little above it with six experts, once λ is chosen.",
    parameters=(NORMALIZE, EPS),
    measures=(Gram(_weights),),
    combine=lambda each: total(each.x * each.weight),
)

METHODS = (Method("multislerp", MULTISLERP, defaults={"normalize": True}),)
