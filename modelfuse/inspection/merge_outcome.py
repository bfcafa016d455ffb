"""What a merge kept of its inputs, tensor by tensor and summed: functions of what ``diff`` measures with the output.

τᵢ is the difference of model i to the base, δ that of the output. Everything follows from their dot products and from
counts of elements that they change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modelfuse.inspection.diff_result import Group

#: A direction that has so small a share of the others' squares cannot be told from them.
RANK = 1e-9


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of one model's difference.

    Attributes:
        projection: ⟨δ, τᵢ⟩ / ‖τᵢ‖²: how often its difference is in the output's, with what others add in its direction.
        coefficient: cᵢ of the weighted sum Σ cⱼτⱼ that is nearest to δ: its own part. None where models' differences
            are not independent.
        left: √(1 − cos²) of δ and τᵢ: the share of the output's difference that is not in its direction.
        dropped: Of the elements that it changes, the share that the output has as they are in the base.
        reversed: Of the elements that both change, the share that the output changes in the opposite direction.
    """

    projection: float | None
    coefficient: float | None
    left: float | None
    dropped: float | None
    reversed: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the output is of its inputs, in some tensors.

    Attributes:
        name: As of the group of ``diff``.
        stack: The same.
        layer: The same.
        module: The same.
        elements: How many elements.
        relative: ‖δ‖ / ‖b‖.
        unchanged: The share of elements that equal the base's.
        residual: ‖δ − Σ cᵢτᵢ‖ / ‖δ‖: what is no weighted sum of the models' differences, as methods that drop, elect or
            round make it.
        cancelled: 1 − ‖Σ cᵢτᵢ‖² / Σ ‖cᵢτᵢ‖², where that is above 0: what the models' parts take from each other.
        nonfinite: Elements of the output that are NaN or infinite.
        models: What became of each model's difference.
    """

    name: str
    stack: str
    layer: int | None
    module: str | None
    elements: int
    relative: float | None
    unchanged: float | None
    residual: float | None
    cancelled: float | None
    nonfinite: int
    models: tuple[Taken, ...]


def outcome_of(group: Group) -> Outcome:
    """What became of the inputs in a group whose last model is the output."""
    gram = _gram(group)
    count, own = len(group.models) - 1, group.models[-1]
    products, square = gram[:count, count], gram[count, count]
    coefficients = _solved(gram[:count, :count], products)
    residual = cancelled = None
    if coefficients is not None and square > 0:
        parts = gram[:count, :count] * np.outer(coefficients, coefficients)
        both, alone = float(parts.sum()), float(np.trace(parts))
        residual = float(max(square - 2 * coefficients @ products + both, 0.0) / square) ** 0.5
        cancelled = max(0.0, 1 - both / alone) if alone > 0 else None
    taken = tuple(
        _taken(group, model, gram, None if coefficients is None else float(coefficients[model]))
        for model in range(count)
    )
    return Outcome(
        group.name, group.stack, group.layer, group.module, group.elements, own.relative, own.unchanged, residual,
        cancelled, own.nonfinite, taken,
    )  # fmt: skip


def _taken(group: Group, model: int, gram: np.ndarray, coefficient: float | None) -> Taken:
    count = len(group.models) - 1
    own, meeting = group.models[model], group.pair(model, count)
    projection = float(gram[model, count] / gram[model, model]) if gram[model, model] > 0 else None
    left = None if meeting.cosine is None else max(0.0, 1 - meeting.cosine**2) ** 0.5
    dropped = None
    if own.unchanged is not None and own.unchanged < 1:
        finite = own.nonfinite / group.elements if group.elements else 0.0
        changed = 1 - own.unchanged - finite
        dropped = min(1.0, max(0.0, 1 - (meeting.both_changed or 0.0) / changed)) if changed > 0 else None
    return Taken(projection, coefficient, left, dropped, meeting.sign_conflict)


def _gram(group: Group) -> np.ndarray:
    """Dot products of all differences, from norms and cosines."""
    norms = np.array([each.norm for each in group.models])
    cosines = np.eye(len(norms))
    for pair in group.pairs:
        cosines[pair.model, pair.other] = 0.0 if pair.cosine is None else pair.cosine
    return cosines * np.outer(norms, norms)


def _solved(gram: np.ndarray, products: np.ndarray) -> np.ndarray | None:
    """The weights of the nearest weighted sum; None where several are as near."""
    if not len(gram):
        return None
    moving = np.flatnonzero(np.diag(gram) > 0)  # A model that is the base here has no part.
    norms = np.sqrt(np.diag(gram)[moving])
    cosines = gram[np.ix_(moving, moving)] / np.outer(norms, norms)
    if not moving.size or np.linalg.eigvalsh(cosines)[0] < RANK:
        return None
    solved = np.zeros(len(gram))
    solved[moving] = np.linalg.solve(cosines, products[moving] / norms) / norms
    return solved


def outcomes_of(groups: Sequence[Group]) -> tuple[Outcome, ...]:
    """The same of several."""
    return tuple(outcome_of(each) for each in groups)
