"""SWUDI: minimize the quadratic of ridge by gradient flow, or only in its strongest directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from modelfuse.methods.expressions import total
from modelfuse.methods.ridge import normalized
from modelfuse.methods.spec import Algebra, Combination, Factors, Floats, Method, Parameter, WholeMatrix

TIME = Parameter(
    "swudi_time",
    1.5,
    "swudi: the time of the gradient flow, relative to the inverse mean eigenvalue.",
    bounds={"gt": 0},
)
SHARE = Parameter(
    "swudi_share", 0.85, "swudi: the share of the directions, strongest first, that are changed.",
    bounds={"gt": 0, "le": 1},
)  # fmt: skip
#: Lower bound of eigenvalues.
LEAST = 1e-8
PAPER = "SWUDI 2026, arXiv:2606.07289; Cheng et al. 2025, arXiv:2503.08099"


def _filtered(
    grams: Floats, weights: Sequence[float], filter_: Callable[[Floats], Floats], algebra: Algebra
) -> Factors:
    """Σwᵢτᵢ, replaced by D·C⁻¹ in eigendirections of C, to the extent given by the filter."""
    grams, _ = normalized(grams)
    whole = grams.sum(0)
    if not whole.any():
        return Factors(np.zeros_like(grams))
    eigenvalues, vectors = algebra.eigh(whole)
    eigenvalues = np.maximum(eigenvalues, LEAST)
    kept = filter_(eigenvalues)
    staying = np.eye(len(whole)) - algebra.product(vectors * kept, vectors.T)
    inverse = algebra.product(vectors * (kept / eigenvalues), vectors.T)
    return Factors(np.stack([
        weight * (staying + algebra.product(gram, inverse)) for gram, weight in zip(grams, weights, strict=True)
    ]))  # fmt: skip


def _swudi(grams: Floats, weights: Sequence[float], settings: Any, inputs: int, algebra: Algebra) -> Factors:
    models = int(np.count_nonzero(np.trace(grams, axis1=1, axis2=2)))

    def filter_(eigenvalues: Floats) -> Floats:
        kept: Floats = 1 - np.exp(-settings.swudi_time * inputs / models * eigenvalues)
        kept[: max(0, kept.size - max(1, math.ceil(settings.swudi_share * inputs)))] = 0
        return kept

    return _filtered(grams, weights, filter_, algebra)


def _swudi_a(grams: Floats, weights: Sequence[float], settings: Any, inputs: int, algebra: Algebra) -> Factors:
    def filter_(eigenvalues: Floats) -> Floats:
        others = inputs - eigenvalues.size  # Directions that no model has, where all of them are left out.
        roots, whole = np.sqrt(eigenvalues).sum() + others * math.sqrt(LEAST), eigenvalues.sum() + others * LEAST
        number = math.ceil(roots**2 / whole)
        kept: Floats = (np.arange(eigenvalues.size) >= eigenvalues.size - number).astype(np.float64)
        return kept

    return _filtered(grams, weights, filter_, algebra)


SWUDI = Combination(
    name="swudi",
    summary="The sum of the differences, moved along the gradient of their interference, in its strongest directions.",
    formula="b + m₀ − m₀VfVᵀ + DV(f/λ)Vᵀ, C = VλVᵀ and D as for ridge, m₀ = Σ wᵢτᵢ, f = 1 − exp(−tλ/mean λ)",
    paper=PAPER,
    measured="As ridge.",
    parameters=(TIME, SHARE),
    matrix=WholeMatrix(_swudi, gram="each", side="inputs", work=lambda models: 7 + models),
    base="required",
    combine=lambda each: total(each.x * each.weight),
)
SWUDI_A = Combination(
    name="swudi_a",
    summary="As swudi, removing all interference in as many directions as the effective rank of the spectrum.",
    formula="as swudi, with f = 1 for the first (Σ√λ)²/Σλ directions, else 0",
    paper=PAPER,
    measured="As ridge; no gain with three gentle experts.",
    matrix=WholeMatrix(_swudi_a, gram="each", side="inputs", work=lambda models: 7 + models),
    base="required",
    combine=lambda each: total(each.x * each.weight),
)

METHODS = (Method("swudi", SWUDI), Method("swudi_a", SWUDI_A))
