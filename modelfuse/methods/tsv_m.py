"""TSV-M: the leading singular directions of each model, orthogonalized against those of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from modelfuse.methods.decompositions import directions, weighted, whitened
from modelfuse.methods.expressions import total
from modelfuse.methods.spec import Algebra, Combination, Factors, Floats, Method, WholeMatrix


def _factors(grams: Floats, weights: Sequence[float], settings: Any, inputs: int, algebra: Algebra) -> Factors:
    grams, models, k = weighted(grams, weights), len(weights), grams.shape[-1]
    found = [directions(algebra, grams[model, model], max(1, k // models)) for model in range(models)]
    right, sizes = np.hstack([vectors for vectors, _ in found]), np.concatenate([sigma for _, sigma in found])
    left, start = [np.zeros_like(right) for _ in range(models)], 0
    for own, (vectors, sigma) in zip(left, found, strict=True):
        own[:, start : start + sigma.size] = vectors / sigma
        start += sigma.size
    factors = whitened(algebra, grams, left, right, sizes) * np.array(weights)[:, None, None]
    return Factors(factors)


TSV_M = Combination(
    name="tsv_m",
    summary="The strongest singular directions of each model's difference, whitened so that models do not interfere.",
    formula="b + Ũ·diag(σ)·Ṽᵀ, of the first r/T singular values of each of T weighted differences of r singular values",
    paper="Gargiulo et al. 2024, Task Singular Vectors: Reducing Task Interference in Model Merging, arXiv:2412.00081",
    measured="Far above task arithmetic with six hard experts, below with three gentle ones and with adapters.",
    matrix=WholeMatrix(_factors, gram="pairs", work=lambda models: 15 + 5.5 * models),
    base="required",
    combine=lambda each: total(each.x * each.weight),
)

METHODS = (Method("tsv_m", TSV_M),)
