"""Iso-C: the merged difference with all singular values equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from modelfuse.methods.expressions import total
from modelfuse.methods.spec import Algebra, Combination, Factors, Floats, Method, Parameter, WholeMatrix

RANK_TOLERANCE = Parameter(
    "rank_tolerance", 1e-6, "iso_c: singular values below this fraction of the largest are treated as zero.",
    bounds={"ge": 0, "lt": 1},
)  # fmt: skip


def _factors(gram: Floats, weights: Sequence[float], settings: Any, inputs: int, algebra: Algebra) -> Factors:
    """mean(σ)·(MᵀM)^(−1/2), over the singular values above the tolerance."""
    squares, vectors = algebra.eigh(gram)
    sigma = np.sqrt(np.maximum(squares, 0))
    counts = sigma > settings.rank_tolerance * sigma[-1]
    if not counts.any():
        return Factors(np.zeros((1, *gram.shape)))
    half = vectors[:, counts] * np.sqrt(sigma[counts].mean() / sigma[counts])
    return Factors(algebra.product(half, half.T)[None])


ISO_C = Combination(
    name="iso_c",
    summary="The weighted sum of the differences with all its singular values replaced by their mean.",
    formula="b + mean(σ)·U·Vᵀ, with Σ wᵢ(xᵢ − b) = U·diag(σ)·Vᵀ; other tensors than matrices: Σ wᵢxᵢ / Σ wᵢ",
    paper="Marczak et al. 2025, No Task Left Behind: Isotropic Model Merging, arXiv:2502.04959",
    measured="Far above task arithmetic with six hard experts, a little with three gentle ones; below with adapters.",
    parameters=(RANK_TOLERANCE,),
    matrix=WholeMatrix(_factors),
    base="required",
    combine=lambda each: total(each.x * each.weight),
)

METHODS = (Method("iso_c", ISO_C),)
