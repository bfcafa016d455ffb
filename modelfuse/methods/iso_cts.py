"""Iso-CTS: as Iso-C, with common and task-specific directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from modelfuse.methods.decompositions import NOISE, directions, weighted, whitened
from modelfuse.methods.expressions import total
from modelfuse.methods.spec import Algebra, Combination, Factors, Floats, Method, Parameter, WholeMatrix

COMMON_FRACTION = Parameter(
    "common_fraction", 0.8,
    "iso_cts: the share of the directions that are common, from the sum; the others come from single models.",
    bounds={"gt": 0, "le": 1},
)  # fmt: skip


def _factors(grams: Floats, weights: Sequence[float], settings: Any, inputs: int, algebra: Algebra) -> Factors:
    grams, models, k, product = weighted(grams, weights), len(weights), grams.shape[-1], algebra.product
    vectors, sigma = directions(algebra, grams.sum((0, 1)), k)
    rank = sigma.size
    own = max(0, round((rank - int(rank * settings.common_fraction)) / models))
    vectors, sigma = vectors[:, : rank - own * models], sigma[: rank - own * models]
    rights, lefts, sizes = [vectors], [[vectors / sigma] for _ in range(models)], [sigma]
    for model in range(models) if own else ():
        # Of the part outside the shared output directions, (I − UUᵀ)τ: with Gram matrices of the outputs, the vectors
        # themselves are projected out, else the sum's image of them.
        gram = grams[model, model]
        least = NOISE * math.sqrt(max(float(np.trace(gram)), 0.0))
        if k == inputs:
            shared = product((vectors / sigma).T, grams[:, model].sum(0))
            mine, size = directions(algebra, gram - product(shared.T, shared), own, least)
            shared_lean = product(vectors / sigma, product(shared, mine / size))
        else:
            rest = np.eye(k) - product(vectors, vectors.T)
            mine, size = directions(algebra, product(rest, product(gram, rest)), own, least)
            shared_lean = np.zeros_like(mine)
        for other, left in enumerate(lefts):
            left.append(mine / size * (other == model) - shared_lean)
        rights.append(mine)
        sizes.append(size)
    every = np.concatenate(sizes)
    left = [np.hstack(each) for each in lefts]
    mean = np.full(every.size, every.mean() if every.size else 0.0)
    factors = whitened(algebra, grams, left, np.hstack(rights), mean) * np.array(weights)[:, None, None]
    return Factors(factors)


ISO_CTS = Combination(
    name="iso_cts",
    summary="As iso_c, but a share of the directions is kept for what single models have beside those of the sum.",
    formula="b + mean(σ)·Ũ·Ṽᵀ, of the sum's first directions and each model's first ones outside of them",
    paper="Marczak et al. 2025, No Task Left Behind: Isotropic Model Merging, arXiv:2502.04959",
    measured="As iso_c.",
    parameters=(COMMON_FRACTION,),
    matrix=WholeMatrix(_factors, gram="pairs", work=lambda models: 22.5 + 11.5 * models),
    base="required",
    combine=lambda each: total(each.x * each.weight),
)

METHODS = (Method("iso_cts", ISO_CTS),)
