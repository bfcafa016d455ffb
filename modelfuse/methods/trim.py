"""Trim (TIES): keep the largest elements."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from modelfuse.methods.expressions import where
from modelfuse.methods.parameters import RESCALE, RESERVE_P
from modelfuse.methods.spec import Magnitudes, Method, OrderStatistics, Sparsifier
from modelfuse.methods.ties import TIES

#: Sums of magnitudes below this are not rescaled.
MIN_SUM = 1e-8


def kept_from(size: int, reserve_p: float) -> int:
    """The rank, ascending from 0, of the smallest magnitude that is kept.

    The quantile is at position (1−p)(size−1). If it falls between two order statistics, the kept elements start at the
    upper one. ``reserve_p`` is taken as the decimal number that the user wrote, so that 0.7 of 11 elements starts at
    rank 3, not 4.
    """
    dropped, of = _dropped(float(reserve_p))
    return -(-dropped * (size - 1) // of)


@lru_cache
def _dropped(reserve_p: float) -> tuple[int, int]:
    return (1 - Fraction(repr(reserve_p))).as_integer_ratio()


def scale(before: float, after: float, least: float = MIN_SUM) -> float:
    """The factor that restores the sum of magnitudes; 1 if a sum is below ``least`` or not finite."""
    return before / after if least <= before < math.inf and after >= least else 1.0


def _numbers(size: int, settings: Any, magnitudes: Magnitudes) -> Mapping[str, float]:
    factor = scale(magnitudes.total, magnitudes.between(0)) if settings.rescale else 1.0
    return {"threshold": magnitudes.at(0), "factor": factor}


TRIM = Sparsifier(
    name="trim",
    summary="Zero all but the largest share of the elements; rescale to the magnitude there was before.",
    formula="keep |x| ≥ the (1−p) quantile of |x|; × Σ|x| before ÷ Σ|x| after",
    paper="Yadav et al. 2023, TIES-Merging, arXiv:2306.01708",
    measured="See ties; with six hard experts, the less is kept, the worse.",
    parameters=(RESERVE_P, RESCALE),
    measures=(
        OrderStatistics(
            ranks=lambda size, settings: (kept_from(size, settings.reserve_p),),
            numbers=_numbers,
        ),
    ),
    element=lambda each: where(abs(each.x) >= each.threshold, each.x, 0.0) * each.factor,
)

METHODS = (Method("ties", TIES, TRIM),)
