"""Model Stock: interpolate between the base and the fine-tunes' mean by the angle between the fine-tunes."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from modelfuse.methods.expressions import total
from modelfuse.methods.spec import Combination, Floats, Gram, Method, Parameter

#: Products of norms below this count as this, and sums of cosines nearer to zero leave the base as it is.
MIN_PRODUCT = 1e-6


def share(gram: Floats) -> float:
    """The interpolation factor t: 0 is the base, 1 the models' mean."""
    models = gram.shape[0]
    norms = np.sqrt(np.diag(gram))
    cosines = [
        float(np.clip(gram[one, other] / max(norms[one] * norms[other], MIN_PRODUCT), -1, 1))
        for one, other in combinations(range(models), 2)
    ]
    cosine = sum(cosines) / len(cosines)
    divisor = 1 + (models - 1) * cosine
    return 0.0 if abs(divisor) < MIN_PRODUCT else models * cosine / divisor


FILTER_WISE = Parameter("filter_wise", False, "model_stock: one angle for each row instead of each tensor.")


def _weights(gram: Floats, settings: Any) -> list[float]:
    return [share(gram) / gram.shape[0]] * gram.shape[0]


MODEL_STOCK = Combination(
    name="model_stock",
    summary="Move from the base towards the models' mean as far as the angle between the models says.",
    formula="b + t·(mean x − b), t = Nc/(1 + (N−1)c), c the mean cosine of the pairs of differences",
    paper="Jang et al. 2024, Model Stock, arXiv:2403.19522",
    measured="For runs of one task: of experts of different tasks it is nearly the base, and last.",
    parameters=(FILTER_WISE,),
    measures=(Gram(_weights, lambda settings: -1 if settings.filter_wise else None),),
    models=(2, None),
    base="required",
    weights="none",
    combine=lambda each: total(each.x * each.weight),
)

METHODS = (Method("model_stock", MODEL_STOCK),)
