"""Drop elements at random and restore the sum of magnitudes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelfuse.methods.dare import DARE
from modelfuse.methods.expressions import Expression, single, where
from modelfuse.methods.magprune import EPSILON, MAGPRUNE
from modelfuse.methods.parameters import MIN_L1, RESCALE, RESERVE_P
from modelfuse.methods.spec import Floats, LineRanks, Sparsifier, Sums
from modelfuse.methods.trim import scale


def _factors(sums: Floats, size: int, settings: Any) -> Mapping[str, Sequence[float]]:
    del size, settings
    return {"factor": [scale(before, after, MIN_L1) for before, after in sums.tolist()]}


def _random_keep(probability: str, *ranks: LineRanks, **fields: Any) -> Sparsifier:
    """A sparsifier that keeps elements with the probability of this name, and restores the sum of magnitudes."""

    def kept(each: Any) -> Expression:
        return where(each.draw < single(getattr(each, probability)), each.x, 0.0)

    sums = Sums(lambda each: (abs(each.x), abs(kept(each))), _factors, needed=lambda settings: bool(settings.rescale))
    return Sparsifier(measures=(*ranks, sums), element=lambda each: kept(each) * each.factor, **fields)


RANDOM = _random_keep(
    "probability",
    name="random",
    summary="Keep each element with one probability and restore the sum of magnitudes.",
    formula="x with probability p, else 0; × Σ|x| before ÷ Σ|x| after",
    paper=DARE.paper,
    parameters=(RESERVE_P, RESCALE),
    numbers=lambda settings: {"probability": settings.reserve_p, "factor": 1.0},
)


def keep_probability(ranks: Floats, length: int, density: float, epsilon: float) -> Floats:
    """The probability of keeping elements of these ranks (ascending by magnitude, from 0) of a row."""
    if density >= 1:
        return ranks * 0 + 1
    shares = ranks / (length - 1) if length > 1 else ranks + 0.5
    probabilities: Floats = density - epsilon + 2 * epsilon * shares
    return probabilities


def _check(settings: Any) -> None:
    low, high = settings.reserve_p - settings.epsilon, settings.reserve_p + settings.epsilon
    if settings.reserve_p < 1 and (low <= 0 or high >= 1):
        raise ValueError(
            f"della keeps elements with probabilities from density − epsilon = {low:g} to density + epsilon = "
            f"{high:g}; both must lie between 0 and 1"
        )


RANDOM_BY_RANK = _random_keep(
    "keep",
    LineRanks(
        # Axis 1: the last one of a matrix, the second one of tensors with more dimensions.
        axis=lambda dimensions: min(dimensions - 1, 1),
        probability=lambda ranks, length, settings: keep_probability(
            ranks, length, settings.reserve_p, settings.epsilon
        ),
    ),
    name="random_by_rank",
    summary="Keep each element with a probability that grows with its rank in its row, restore the sum of magnitudes.",
    formula="x with probability p − ε + 2ε·r/(n − 1), r the rank by |x| in a row of n from 0, the smallest; else 0",
    paper=MAGPRUNE.paper,
    parameters=(RESERVE_P, EPSILON, RESCALE),
    numbers=lambda settings: {"factor": 1.0},
    check=_check,
)
