"""NearSwap: take a model's elements where they are close to the base's."""

from __future__ import annotations

from typing import Any

from modelfuse.methods.expressions import Expression, least, most, total
from modelfuse.methods.spec import Combination, Method, Parameter

#: Lower bound of distances.
MIN_DISTANCE = 1e-6

T = Parameter("nearswap_t", 0.001, "nearswap: elements that differ by at most this are taken from the model.")


def _combine(each: Any) -> Expression:
    share = least(most(each.nearswap_t / most(abs(each.x), MIN_DISTANCE), 0.0), 1.0)
    return total(each.x * share)


NEARSWAP = Combination(
    name="nearswap",
    summary="Move each base element towards the model's: all the way where they are close, less where they are not.",
    formula="p·x + (1−p)·b, p = t/|x − b| between 0 and 1",
    paper="Alchemonaut 2024, QuartetAnemoi-70B (a model card)",
    measured="Experts merged in turn: far below task arithmetic.",
    parameters=(T,),
    models=(1, 1),
    base="required",
    weights="none",
    combine=_combine,
)

METHODS = (Method("nearswap", NEARSWAP),)
