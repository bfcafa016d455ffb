"""Model Breadcrumbs: drop the largest and the smallest elements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from modelfuse.methods.expressions import where
from modelfuse.methods.linear import LINEAR
from modelfuse.methods.parameters import MIN_L1, RESCALE, RESERVE_P
from modelfuse.methods.spec import Magnitudes, Method, OrderStatistics, Parameter, Sparsifier
from modelfuse.methods.ties import TIES
from modelfuse.methods.trim import scale

GAMMA = Parameter(
    "gamma", 0.01, "breadcrumbs: the share of the largest elements to drop, as far as reserve_p allows.",
    bounds={"ge": 0, "lt": 1}, per_model=True,
)  # fmt: skip


def _ranks(size: int, settings: Any) -> Sequence[int]:
    """The smallest and the largest kept rank, ascending from 0; empty if nothing is kept."""
    kept, top = math.floor(min(settings.reserve_p, 1) * size), math.floor(settings.gamma * size)
    bottom = max(0, size - kept - top)
    return (bottom, bottom + kept - 1) if kept > 0 else ()


def _numbers(size: int, settings: Any, magnitudes: Magnitudes) -> Mapping[str, float]:
    if not _ranks(size, settings):
        return {"low": math.inf, "high": 0.0, "factor": 1.0}
    factor = scale(magnitudes.total, magnitudes.between(0, 1), MIN_L1) if settings.rescale else 1.0
    return {"low": magnitudes.at(0), "high": magnitudes.at(1), "factor": factor}


BREADCRUMBS = Sparsifier(
    name="breadcrumbs",
    summary="Zero the largest and the smallest elements; those that equal the last one kept are kept too.",
    formula="of n by |x| ascending, drop the last ⌊γn⌋ as far as p allows, keep ⌊pn⌋ before them, drop the rest",
    paper="Davari and Belilovsky 2023, Model Breadcrumbs, arXiv:2312.06795",
    measured="A little below task arithmetic.",
    parameters=(RESERVE_P, GAMMA, RESCALE),
    measures=(OrderStatistics(ranks=_ranks, numbers=_numbers, sums=lambda settings: bool(settings.rescale)),),
    element=lambda each: where((abs(each.x) >= each.low) & (abs(each.x) <= each.high), each.x, 0.0) * each.factor,
)

METHODS = (
    Method("breadcrumbs", LINEAR, BREADCRUMBS, defaults={"rescale": False}, base="required"),
    Method("breadcrumbs_ties", TIES, BREADCRUMBS, defaults={"rescale": False, "normalize": False}, base="required"),
)
