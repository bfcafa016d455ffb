"""SCE: select elements by variance, weight models by mean squares, elect signs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from modelfuse.methods.expressions import Expression, most, total, where
from modelfuse.methods.spec import Combination, Floats, Magnitudes, Method, OrderStatistics, Parameter, Sums

#: If the mean squares sum to less than this, weights are equal; also a lower bound of sums of agreeing weights.
MIN_SUM = 1e-6

SELECT_TOPK = Parameter(
    "select_topk", 1.0, "sce: the share of elements to keep, by variance between the models.", bounds={"ge": 0, "le": 1}
)


def _variance(each: Any) -> Expression:
    deviation: Expression = each.x - total(each.x) / each.models
    variance: Expression = total(deviation * deviation) / each.models
    return variance


def _selected(each: Any) -> Expression:
    # Written so that NaN is selected: it must reach the output.
    return where(~(_variance(each) < each.least_variance), each.x, 0.0)


def _ranks(size: int, settings: Any) -> Sequence[int]:
    kept = math.floor(settings.select_topk * size)
    return (size - kept,) if kept > 0 else ()


def _least(size: int, settings: Any, magnitudes: Magnitudes) -> Mapping[str, float]:
    return {"least_variance": magnitudes.at(0) if _ranks(size, settings) else math.inf}


def _weights(sums: Floats, size: int, settings: Any) -> Mapping[str, Sequence[float]]:
    del settings
    squares = (sums[:, 0] / max(size, 1)).tolist()
    whole = math.fsum(squares)
    return {"weight": [1 / len(squares) if whole < MIN_SUM else each / whole for each in squares]}


def _combine(each: Any) -> Expression:
    x = _selected(each)
    agrees = ~(x * where(total(x) >= 0.0, 1.0, -1.0) <= 0.0)
    return total(where(agrees, x * each.weight, 0.0)) / most(total(where(agrees, each.weight, 0.0)), MIN_SUM)


def _selects(settings: Any) -> bool:
    return bool(settings.select_topk < 1)


SCE = Combination(
    name="sce",
    summary="Keep the elements of largest variance, weight models by their mean squares, sum those that agree in sign.",
    formula=(
        "Σ wᵢdᵢ ÷ Σ wᵢ over sign dᵢ = sign Σ dᵢ, wᵢ = mean dᵢ² ÷ Σ of all; before, dᵢ = 0 but for the share k of the "
        "elements with the largest variance"
    ),
    paper="Wan et al. 2024, FuseChat: Knowledge fusion of chat models, arXiv:2408.07990",
    measured="As task arithmetic with three gentle experts, far below with six hard ones and with adapters.",
    parameters=(SELECT_TOPK,),
    numbers=lambda settings: {"least_variance": 0.0},
    measures=(
        OrderStatistics(_ranks, _least, sums=lambda settings: False, of=_variance, nonzero=True, needed=_selects),
        Sums(lambda each: (_selected(each) * _selected(each),), _weights),
    ),
    base="required",
    weights="none",
    combine=_combine,
)

METHODS = (Method("sce", SCE),)
