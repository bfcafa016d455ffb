"""MagPrune (DELLA): drop elements at random, small ones more often."""

from __future__ import annotations

from typing import Any

from modelfuse.methods.expressions import Expression, single, where
from modelfuse.methods.linear import LINEAR
from modelfuse.methods.parameters import RESCALE, RESERVE_P
from modelfuse.methods.spec import Floats, Method, Parameter, Ranks, Sparsifier
from modelfuse.methods.ties import TIES

EPSILON = Parameter(
    "epsilon", 0.14, "magprune: the range of the keep probability over the ranks.", bounds={"ge": 0}, per_model=True
)


def keep_probability(ranks: Floats, size: int, reserve_p: float, epsilon: float) -> Floats:
    """The probability of keeping the elements of these ranks (descending by magnitude, from 0).

    Equal magnitudes share the mean rank of their group.
    """
    probabilities: Floats = reserve_p + epsilon / 2 - epsilon * ranks / size
    return probabilities


def _check(settings: Any) -> None:
    low, high = settings.reserve_p - settings.epsilon / 2, settings.reserve_p + settings.epsilon / 2
    if low <= 0 or high >= 1:
        raise ValueError(
            f"magprune keeps elements with probabilities from reserve_p − epsilon/2 = {low:g} to "
            f"reserve_p + epsilon/2 = {high:g}; both must lie between 0 and 1",
            "Choose a reserve_p nearer to 0.5 or a smaller epsilon.",
        )


def _element(each: Any) -> Expression:
    kept = where(each.draw < single(each.keep), each.x, 0.0)
    return kept / each.keep if each.rescale else kept


MAGPRUNE = Sparsifier(
    name="magprune",
    summary="Drop each element with a probability that grows with its rank by magnitude (DELLA's MagPrune).",
    formula="dropped with probability d = (1−p) − ε/2 + ε·r/n, r the rank by |x| from 0, the largest; else x/(1−d)",
    paper="Deep et al. 2024, DELLA-Merging, arXiv:2406.11617",
    measured="Gains nothing over keeping all; with signs elected, far below with six hard experts.",
    parameters=(RESERVE_P, EPSILON, RESCALE),
    check=_check,
    measures=(
        Ranks(
            probability=lambda ranks, size, settings: keep_probability(
                ranks, size, settings.reserve_p, settings.epsilon
            ),
            spread=lambda settings: float(settings.epsilon),
        ),
    ),
    element=_element,
)

METHODS = (Method("della", TIES, MAGPRUNE), Method("della_linear", LINEAR, MAGPRUNE))
