"""Parameter competition balancing: every element is weighted by how large it is in its model, and how others agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from modelfuse.methods.expressions import Expression, least, most, number, total, where
from modelfuse.methods.spec import Combination, Floats, Magnitudes, Method, OrderStatistics, Parameter, Sums

KEEP = Parameter(
    "pcb_keep", 0.2, "pcb: the share of each model's elements to keep, by score.",
    bounds={"gt": 0, "le": 1},
)  # fmt: skip
#: What is measured of each model: where its magnitudes are capped; the least score that is kept, and the largest one.
CAP, EDGE, TOP = number("cap"), number("edge"), number("top")
#: The share of magnitudes that is not capped.
CAPPED = Fraction("0.999")
#: What is divided by is at least this: squares and scores; sums of scores.
TINY, MIN_SUM = 1e-30, 1e-12
#: Powers of e below e^−LOWEST count as that.
LOWEST = 32.0
#: How often a power is squared, and an angle doubled.
SQUARINGS, DOUBLINGS = 5, 4
#: 1/9!, …, 1/0!: enough between −1 and 0.
FACTORS = tuple(1 / math.factorial(n) for n in range(10, -1, -1))


def _power(x: Expression) -> Expression:
    """e to the power of what is not above 0, by arithmetic that is the same everywhere."""
    x = most(x, -LOWEST) / 2.0**SQUARINGS
    result: Any = FACTORS[0]
    for factor in FACTORS[1:]:
        result = x * result + factor
    for _ in range(SQUARINGS):
        result = result * result
    power: Expression = result
    return power


def _tanh(x: Expression) -> Expression:
    """The hyperbolic tangent, by a fraction that is good up to 1, and its formula for the double."""
    x = least(most(x, -(2.0**DOUBLINGS)), 2.0**DOUBLINGS) / 2.0**DOUBLINGS
    square = x * x
    result = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + square * 15.0))
    for _ in range(DOUBLINGS):
        result = 2.0 * result / (1.0 + result * result)
    return result


def _score(each: Any) -> Expression:
    """How an element balances within its model, times how with the others; what they contradict counts as none."""
    capped = least(abs(each.x), CAP) / most(CAP, TINY)
    within = _power(each.models * (capped * capped - 1.0))
    between = _tanh(each.x * total(each.x) / most(each.square, TINY))
    return most(within * between, 0.0)


def _weight(each: Any) -> Expression:
    score = _score(each)
    return where(~(score < EDGE), score / most(TOP, TINY), 0.0)


def _position(size: int, share: Fraction) -> tuple[int, float]:
    """The rank below a quantile, and how far the quantile is on the way to the next."""
    position = share * (size - 1)
    return math.floor(position), float(position - math.floor(position))


def _between(size: int, share: Fraction, magnitudes: Magnitudes) -> float:
    _, part = _position(size, share)
    low, high = magnitudes.at(0), magnitudes.at(1)
    return low + part * (high - low)


def _ranks(size: int, share: Fraction) -> Sequence[int]:
    below, _ = _position(size, share)
    return below, min(below + 1, size - 1), size - 1


def _dropped(settings: Any) -> Fraction:
    return 1 - Fraction(repr(float(settings.pcb_keep)))


def _mean_square(sums: Floats, size: int, settings: Any) -> Mapping[str, Sequence[float]]:
    mean = float(sums[:, 0].sum()) / max(size * len(sums), 1)
    return {"square": [mean] * len(sums)}


PCB = Combination(
    name="pcb",
    summary="The models' elements, weighted by a score of how large they are and how the others agree; low ones drop.",
    formula=(
        "Σ sᵢxᵢ ÷ Σ sᵢ, sᵢ = e^{N(min(|xᵢ|, c)²/c² − 1)}·tanh(xᵢ·Σxⱼ ÷ mean x²) ÷ the largest; 0 if negative or not "
        "in the share k with the highest, c the 0.999 quantile of |xᵢ|"
    ),
    paper="Du et al. 2024, Parameter Competition Balancing for Model Merging, arXiv:2410.02396",
    measured="A little above task arithmetic with three gentle experts, far below with six hard ones or adapters.",
    parameters=(KEEP,),
    measures=(
        OrderStatistics(
            lambda size, settings: _ranks(size, CAPPED),
            lambda size, settings, magnitudes: {"cap": _between(size, CAPPED, magnitudes)},
            sums=lambda settings: False, of=lambda each: each.x,
        ),
        Sums(lambda each: (each.x * each.x,), _mean_square),
        OrderStatistics(
            lambda size, settings: _ranks(size, _dropped(settings)),
            lambda size, settings, magnitudes: {
                "edge": _between(size, _dropped(settings), magnitudes), "top": magnitudes.at(2),
            },
            sums=lambda settings: False, of=_score,
        ),
    ),
    base="required",
    weights="none",
    combine=lambda each: total(each.x * _weight(each)) / most(total(_weight(each)), MIN_SUM),
)  # fmt: skip

METHODS = (Method("pcb", PCB),)
