"""The difference that does to each model's own inputs what the model does: a linear regression.

The same system as ridge's, with Gram matrices Gᵢ = XᵢᵀXᵢ of the inputs that each model's layers have when it reads
texts of its own: Σ ‖(m − τᵢ)Xᵢᵀ‖² is least where m(ΣGᵢ) = Στᵢ Gᵢ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from modelfuse.methods.decompositions import trace
from modelfuse.methods.expressions import total
from modelfuse.methods.spec import Algebra, Combination, Factors, Floats, Method, Parameter, WholeMatrix

SHRINK = Parameter(
    "regmean_shrink", 0.9, "regmean: what off-diagonal elements of the Gram matrices are multiplied by.",
    bounds={"ge": 0, "le": 1},
)  # fmt: skip
#: Added to the sum's diagonal, times its mean.
LEAST = 1e-6


def _factors(grams: Floats, weights: Sequence[float], settings: Any, inputs: int, algebra: Algebra) -> Factors:
    """wᵢGᵢ(ΣG)⁻¹, weights with a mean of 1; where nothing was seen, the weighted mean."""
    even = np.array(weights) * len(weights) / sum(weights)
    diagonal = np.arange(inputs)
    kept = grams[:, diagonal, diagonal]
    grams = grams * settings.regmean_shrink
    grams[:, diagonal, diagonal] = kept
    whole = grams.sum(0)
    least = LEAST * trace(whole) / inputs
    if not least > 0:
        return Factors(even[:, None, None] / len(weights) * np.eye(inputs))
    grams *= even[:, None, None]
    whole[diagonal, diagonal] += least
    return Factors(grams, algebra.inverse(whole))


REGMEAN = Combination(
    name="regmean",
    summary="The difference nearest to each model's own on inputs that it had, as `modelfuse collect` has seen them.",
    formula="b + (Σ wᵢτᵢGᵢ)(Σ Gᵢ)⁻¹, Gᵢ = XᵢᵀXᵢ of its inputs X, off-diagonals times s; weights with a mean of 1",
    paper="Jin et al. 2023, Dataless Knowledge Fusion by Merging Weights of Language Models, arXiv:2212.09849",
    measured="The best with gentle experts and, by far, with adapters; level with ridge with hard ones.",
    parameters=(SHRINK,),
    matrix=WholeMatrix(_factors, gram="given", side="inputs", work=lambda models: 1.5, fixed_order=True),
    base="required",
    weights="relative",
    combine=lambda each: total(each.x * each.weight),
)

METHODS = (Method("regmean", REGMEAN),)
