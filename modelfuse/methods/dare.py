"""DARE: drop elements at random and rescale the rest."""

from __future__ import annotations

from modelfuse.methods.expressions import single, where
from modelfuse.methods.linear import LINEAR
from modelfuse.methods.parameters import RESCALE, RESERVE_P
from modelfuse.methods.spec import Method, Sparsifier
from modelfuse.methods.ties import TIES

DARE = Sparsifier(
    name="dare",
    summary="Keep each element with one probability and scale it up to keep the mean.",
    formula="x/p with probability p, else 0",
    paper="Yu et al. 2023, Language models are super Mario (DARE), arXiv:2311.03099",
    measured="Gains nothing over keeping all; with signs elected, far below with six hard experts.",
    parameters=(RESERVE_P, RESCALE),
    numbers=lambda settings: {
        "probability": settings.reserve_p,
        "divisor": settings.reserve_p if settings.rescale else 1.0,
    },
    element=lambda each: where(each.draw < single(each.probability), each.x, 0.0) / each.divisor,
)

METHODS = (Method("dare_linear", LINEAR, DARE), Method("dare_ties", TIES, DARE))
