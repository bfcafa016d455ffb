"""Data-free ridge regression: the merged difference that acts on each model's inputs like the model's own difference.

The rows of a difference serve as a proxy for the inputs that its model saw. With C = Σ τᵢᵀτᵢ/‖τᵢ‖² and
D = Σ wᵢτᵢ(τᵢᵀτᵢ)/‖τᵢ‖², the quadratic Σ ‖(m − τᵢ)τᵢᵀ‖²/‖τᵢ‖² has the gradient 2(mC − D).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from modelfuse.methods.decompositions import trace
from modelfuse.methods.expressions import total
from modelfuse.methods.spec import Algebra, Combination, Factors, Floats, Method, Parameter, WholeMatrix

RIDGE = Parameter(
    "ridge_mu", 0.3, "ridge: the regularization towards the plain sum, relative to the mean eigenvalue.",
    bounds={"gt": 0},
)  # fmt: skip


def normalized(grams: Floats) -> tuple[Floats, Floats]:
    """Gram matrices divided by their traces, and the traces; zero for a model that equals the base."""
    traces: Floats = np.array([trace(gram) for gram in grams])
    return grams / np.where(traces > 0, traces, 1)[:, None, None], traces


def _factors(grams: Floats, weights: Sequence[float], settings: Any, inputs: int, algebra: Algebra) -> Factors:
    """wᵢ(Gᵢ + μ̄) and (C + μ̄)⁻¹, of normalized Gram matrices."""
    grams, _ = normalized(grams)
    whole = grams.sum(0)
    ridge, diagonal = settings.ridge_mu * trace(whole) / inputs, np.arange(len(whole))
    if not ridge:
        return Factors(np.zeros_like(grams))
    grams[:, diagonal, diagonal] += ridge
    grams *= np.array(weights)[:, None, None]
    whole[diagonal, diagonal] += ridge
    return Factors(grams, algebra.inverse(whole))


def _dual(grams: Floats, weights: Sequence[float], settings: Any, inputs: int, algebra: Algebra) -> Factors:
    """The same from Gram matrices of outputs.

    With S = [τ₁/‖τ₁‖; …], P = SSᵀ and R = [wᵢ‖τᵢ‖(Pᵢᵢ + μ̄)]ᵢ: m = R(P + μ̄)⁻¹S.
    """
    models, k = len(weights), grams.shape[-1]
    sizes = np.sqrt([trace(grams[model, model]) for model in range(models)])
    if not sizes.any():
        return Factors(np.zeros((models, k, k)))
    inverse = np.divide(1, sizes, out=np.zeros_like(sizes), where=sizes > 0)
    scaled = grams * (inverse[:, None] * inverse)[:, :, None, None]
    ridge = settings.ridge_mu * np.count_nonzero(sizes) / inputs
    whole = scaled.transpose(0, 2, 1, 3).reshape(models * k, models * k)
    right = np.vstack([
        weights[model] * sizes[model] * (scaled[model, model] + ridge * np.eye(k)) for model in range(models)
    ])  # fmt: skip
    whole[np.diag_indices(models * k)] += ridge
    solved = algebra.solve(whole, right).reshape(models, k, k)
    return Factors(solved * inverse[:, None, None])


RIDGE_MERGE = Combination(
    name="ridge",
    summary="The difference closest to each model's own in the directions that it uses: one linear system per matrix.",
    formula="b + (D + μ̄Σwᵢτᵢ)(C + μ̄)⁻¹, C = Σ τᵢᵀτᵢ/‖τᵢ‖², D = Σ wᵢτᵢ(τᵢᵀτᵢ)/‖τᵢ‖², μ̄ = μT/inputs",
    paper=(
        "after Cheng et al. 2025, Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via "
        "Task Vectors, arXiv:2503.08099"
    ),
    measured="The best without data on full fine-tunes, gentle or hard; below task arithmetic with adapters.",
    parameters=(RIDGE,),
    matrix=WholeMatrix(
        _factors,
        gram="each",
        side="inputs",
        work=lambda models: 1.5,
        fixed_order=True,
        dual=WholeMatrix(
            _dual, gram="pairs", side="outputs", work=lambda models: models**3 + 2.0 * models**2, fixed_order=True
        ),
    ),
    base="required",
    combine=lambda each: total(each.x * each.weight),
)

METHODS = (Method("ridge", RIDGE_MERGE),)
