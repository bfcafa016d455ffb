"""The Karcher mean of the models' directions: the point on the sphere with the least sum of squared distances."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from modelfuse.methods.expressions import total
from modelfuse.methods.spec import Combination, Floats, Gram, Method, Parameter

MAX_ITER = Parameter("karcher_max_iter", 10, "karcher: the most iterations.", bounds={"ge": 0, "le": 10**6})
TOL = Parameter(
    "karcher_tol", 1e-5, "karcher: norms, angles and steps below this are treated as zero.", bounds={"ge": 0}
)


def coefficients(gram: Floats, max_iter: int, tol: float) -> list[float]:
    """One factor per model. Points on the sphere are represented by their weights as sums of the models."""
    models = gram.shape[0]
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    if not np.isfinite(gram).all():
        return [math.nan] * models
    kept = np.flatnonzero(norms > tol)
    if not kept.size:
        return [0.0] * models
    cosines = gram[np.ix_(kept, kept)] / np.outer(norms[kept], norms[kept])
    mean = np.full(kept.size, 1 / kept.size)
    size = _length(cosines, mean)
    mean = mean / size if size >= tol else np.eye(kept.size)[0]
    for _ in range(max_iter):
        step = _step(cosines, mean, tol)
        size = _length(cosines, step)
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
        mean = mean / _length(cosines, mean)
    factors = np.zeros(models)
    factors[kept] = mean / norms[kept] * (norms.sum() / models)
    found: list[float] = factors.tolist()
    return found


def _step(cosines: Floats, mean: Floats, tol: float) -> Floats:
    """The mean of the logarithm maps: tangent vectors at a point towards the models, as long as the angles."""
    step = np.zeros(mean.size)
    for model, dot in enumerate(np.clip(cosines @ mean, -1.0, 1.0).tolist()):
        angle = math.acos(dot)
        if angle >= tol:
            share = angle / math.sin(angle) / mean.size
            step -= share * dot * mean
            step[model] += share
    return step


def _length(cosines: Floats, weights: Floats) -> float:
    return math.sqrt(max(float(weights @ cosines @ weights), 0.0))


def _weights(gram: Floats, settings: Any) -> list[float]:
    return coefficients(gram, int(settings.karcher_max_iter), settings.karcher_tol)


KARCHER = Combination(
    name="karcher",
    summary="The mean of the models' directions on the sphere, found by iterations, times the mean of their norms.",
    formula="m · Σ‖xᵢ‖/N, m the unit tensor with the least Σ (angle of m and xᵢ)²",
    paper="Karcher 1977, Riemannian center of mass and mollifier smoothing, CPAM 30(5)",
    measured="Below task arithmetic, as it has no λ.",
    parameters=(MAX_ITER, TOL),
    measures=(Gram(_weights),),
    weights="none",
    base="none",
    combine=lambda each: total(each.x * each.weight),
)

METHODS = (Method("karcher", KARCHER),)
