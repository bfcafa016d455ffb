"""Arcee Fusion: take a model's elements where they are most important."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from modelfuse.methods.expressions import Expression, total, where
from modelfuse.methods.spec import Combination, Divergence, Magnitudes, Method, OrderStatistics

#: Added to the softmax.
LEAST_SHARE = 1e-8
#: The threshold's distance from the median, in interquartile ranges.
RANGES = 1.5


def _importance(each: Any) -> Expression:
    return total(abs(each.x) * each.divergence)


def _ranks(size: int, settings: Any) -> Sequence[int]:
    del settings
    return tuple(math.floor(share * (size - 1)) for share in (0.25, 0.5, 0.75))


def _threshold(size: int, settings: Any, magnitudes: Magnitudes) -> Mapping[str, float]:
    del size, settings
    return {"threshold": magnitudes.at(1) + RANGES * (magnitudes.at(2) - magnitudes.at(0))}


ARCEE_FUSION = Combination(
    name="arcee_fusion",
    summary="The model's elements where their distance to the base, times their row's, is large; else the base's.",
    formula="x where |x − b|·D ≥ median + 1.5·(Q₃ − Q₁) of it, else b; D = Σ p ln(p/q) of the row's softmax of x and b",
    paper="Arcee.ai 2024, Arcee Fusion (Virtuoso's model cards)",
    measured="Experts merged in turn: far below task arithmetic.",
    measures=(
        Divergence(LEAST_SHARE),
        OrderStatistics(_ranks, _threshold, sums=lambda settings: False, of=_importance),
    ),
    models=(1, 1),
    base="required",
    weights="none",
    combine=lambda each: where(~(_importance(each) < each.threshold), total(each.x), 0.0),
)

METHODS = (Method("arcee_fusion", ARCEE_FUSION),)
