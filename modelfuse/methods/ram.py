"""RAM: keep what a single model changed, average what several changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modelfuse.methods.expressions import Expression, most, number, total, where
from modelfuse.methods.spec import Combination, Floats, Method, Parameter, Sums

EPSILON = Parameter("ram_epsilon", 1e-5, "ram: elements whose difference is larger count as changed.", bounds={"ge": 0})
R = Parameter("ram_r", 0.1, "ramplus_tl: r in the gain 1 + r·min(ρ, α) of elements that only one model has changed.")
ALPHA = Parameter(
    "ram_alpha",
    0.2,
    "ramplus_tl: α, the limit of ρ, the ratio of a model's shared to its unshared changes.",
    bounds={"ge": 0},
)
PAPER = "Yuan et al. 2026, Behavior knowledge merge in reinforced agentic models (RAM), arXiv:2601.13572"
MEASURED = "As task arithmetic. Meant for experts of reinforcement learning, which were not measured."


def _active(each: Any) -> Expression:
    # Written so that NaN counts as active: it must reach the output.
    same: Expression = abs(each.x) <= each.ram_epsilon
    return ~same


def _count(each: Any) -> Expression:
    """How many models changed an element."""
    return total(where(_active(each), 1.0, 0.0))


def _mean(each: Any) -> Expression:
    return total(where(_active(each), each.x, 0.0)) / most(_count(each), 1.0)


def _terms(each: Any) -> tuple[Expression, ...]:
    """Indicators of elements that a model shares with others, and of those that only it changed."""
    shared = _count(each) > 1.0
    return where(_active(each) & shared, 1.0, 0.0), where(_active(each) & ~shared, 1.0, 0.0)


def _gains(sums: Floats, size: int, settings: Any) -> Mapping[str, Sequence[float]]:
    del size
    shares = sums[:, 0] / np.maximum(sums[:, 1], settings.ram_epsilon)
    return {"gain": (1 + settings.ram_r * np.clip(shares, 0, settings.ram_alpha)).tolist()}


def _combine_gained(each: Any) -> Expression:
    own = total(where(_active(each), each.x * number("gain"), 0.0))
    return where(_count(each) > 1.0, _mean(each), own)


RAM = Combination(
    name="ram",
    summary="The mean, element by element, of the models that differ from the base there.",
    formula="Σ dᵢ / c over the c models with |dᵢ| > ε",
    paper=PAPER,
    measured=MEASURED,
    parameters=(EPSILON,),
    base="required",
    weights="none",
    combine=_mean,
)
RAMPLUS_TL = Combination(
    name="ramplus_tl",
    summary="As ram, and scales up what a single model changed by its share of elements that others changed too.",
    formula="dᵢ·(1 + r·min(ρᵢ, α)) where model i alone differs, ρᵢ = its shared elements ÷ its own; else as ram",
    paper=PAPER,
    measured=MEASURED,
    parameters=(EPSILON, R, ALPHA),
    measures=(Sums(_terms, _gains),),
    base="required",
    weights="none",
    combine=_combine_gained,
)

METHODS = (Method("ram", RAM), Method("ramplus_tl", RAMPLUS_TL))
