"""TIES: elect a sign for each element, and combine the models that agree with it."""

from __future__ import annotations

from typing import Any

from modelfuse.methods.expressions import Expression, sign, total, where
from modelfuse.methods.parameters import NORMALIZE
from modelfuse.methods.spec import Combination, Parameter

#: The sum is not divided by the agreeing weights if these sum to less than this.
MIN_DIVISOR = 1e-8

ELECT_TYPE = Parameter(
    "ties_elect_type",
    "sum",
    "ties: elect signs by value or by count.",
    choices=("sum", "count"),
)


def _sum(each: Any) -> tuple[Expression, Expression]:
    """The weighted sum of the models that agree, and the sum of their weights."""
    y = each.x * each.weight
    elected = total(y if each.ties_elect_type == "sum" else sign(y))
    # Written so that NaN agrees with either sign: it must reach the output.
    agrees = ~(y * where(elected >= 0.0, 1.0, -1.0) <= 0.0)
    return total(where(agrees, y, 0.0)), total(where(agrees, each.weight, 0.0))


def _combine(each: Any) -> Expression:
    result, divisor = _sum(each)
    return result / where(abs(divisor) >= MIN_DIVISOR, divisor, 1.0) if each.normalize else result


def _elect(each: Any) -> Expression:
    result, divisor = _sum(each)
    return result / where(abs(divisor) > 0.0, divisor, 1.0) if each.normalize else result


TIES = Combination(
    name="ties",
    summary="The sum of the models whose sign, element by element, is the elected one.",
    formula=(
        "yᵢ = wᵢxᵢ; s = + where Σ yᵢ ≥ 0 (sum) or Σ sign yᵢ ≥ 0 (count), else −; Σ yᵢ over sign yᵢ = s, and with "
        "normalize ÷ Σ of their wᵢ"
    ),
    paper="Yadav et al. 2023, TIES-Merging, arXiv:2306.01708",
    measured="A little above task arithmetic with three gentle experts, far below with six hard ones or adapters.",
    parameters=(ELECT_TYPE, NORMALIZE),
    weights="relative",
    combine=_combine,
)

ELECT = Combination(
    name="elect",
    summary="The same as ties, which is divided by the agreeing weights unless they sum to exactly zero.",
    formula=TIES.formula,
    paper=TIES.paper,
    parameters=(ELECT_TYPE, NORMALIZE),
    weights="relative",
    combine=_elect,
)
