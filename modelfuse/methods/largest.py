"""Keep a fixed number of the largest elements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from modelfuse.methods.expressions import where
from modelfuse.methods.parameters import MIN_L1, RESCALE, RESERVE_P
from modelfuse.methods.spec import Magnitudes, OrderStatistics, Sparsifier
from modelfuse.methods.trim import TRIM, scale


def _ranks(size: int, settings: Any) -> Sequence[int]:
    """The smallest kept rank, ascending from 0; empty if nothing is kept."""
    if settings.reserve_p <= 0:
        return ()
    return (size - min(max(1, math.floor(settings.reserve_p * size)), size),)


def _numbers(size: int, settings: Any, magnitudes: Magnitudes) -> Mapping[str, float]:
    if not _ranks(size, settings):
        return {"threshold": math.inf, "factor": 1.0}
    factor = scale(magnitudes.total, magnitudes.between(0), MIN_L1) if settings.rescale else 1.0
    return {"threshold": magnitudes.at(0), "factor": factor}


LARGEST = Sparsifier(
    name="largest",
    summary="Zero all but a number of the largest elements; those that equal the last one kept are kept too.",
    formula="keep the ⌊pn⌋ largest |x| of n, at least one; × Σ|x| before ÷ Σ|x| after",
    paper=TRIM.paper,
    parameters=(RESERVE_P, RESCALE),
    measures=(OrderStatistics(_ranks, _numbers, sums=lambda settings: bool(settings.rescale)),),
    element=lambda each: where(abs(each.x) >= each.threshold, each.x, 0.0) * each.factor,
)
