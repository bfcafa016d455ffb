"""What a merge kept of its inputs, tensor by tensor and summed: functions of what ``diff`` measures with the output.

τᵢ is the difference of model i to the base, δ that of the output. Everything follows from their dot products and from
counts of elements that they change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelfuse.inspection.diff_measures import Group, Pair

Array = np.ndarray[Any, Any]
Number = float | None

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
    return outcomes_of([group])[0]


def outcomes_of(groups: Sequence[Group]) -> tuple[Outcome, ...]:
    """The same for several groups of the same models."""
    if not groups:
        return ()
    gram = _grams(groups)
    count = gram.shape[1] - 1
    models, products, square = gram[:, :count, :count], gram[:, :count, count], gram[:, count, count]
    coefficients, independent = _solved(models, products)
    parts = models * coefficients[:, :, None] * coefficients[:, None, :]
    both, alone = parts.sum(axis=(1, 2)), np.trace(parts, axis1=1, axis2=2)
    rest = np.maximum(square - 2 * (coefficients * products).sum(axis=1) + both, 0.0)
    known = independent & (square > 0)
    columns = (
        _told(np.sqrt(rest / _positive(square)), known),
        _told(np.maximum(0.0, 1 - both / _positive(alone)), known & (alone > 0)),
        _told(products / _positive(np.diagonal(models, axis1=1, axis2=2)), np.diagonal(models, axis1=1, axis2=2) > 0),
        _told(coefficients, np.broadcast_to(independent[:, None], coefficients.shape)),
    )
    return tuple(_outcome(group, *row) for group, *row in zip(groups, *columns, strict=True))


def _outcome(
    group: Group, residual: Number, cancelled: Number, projections: Sequence[Number], coefficients: Sequence[Number]
) -> Outcome:
    own, count = group.models[-1], len(group.models) - 1
    taken = []
    for model, projection, coefficient in zip(range(count), projections, coefficients, strict=True):
        meeting = group.pair(model, count)
        left = None if meeting.cosine is None else max(0.0, 1 - meeting.cosine**2) ** 0.5
        taken.append(Taken(projection, coefficient, left, _dropped(group, model, meeting), meeting.sign_conflict))
    return Outcome(
        group.name, group.stack, group.layer, group.module, group.elements, own.relative, own.unchanged, residual,
        cancelled, own.nonfinite, tuple(taken),
    )  # fmt: skip


def _dropped(group: Group, model: int, meeting: Pair) -> Number:
    own = group.models[model]
    if own.unchanged is None or own.unchanged >= 1:
        return None
    nonfinite = own.nonfinite / group.elements if group.elements else 0.0
    changed = 1 - own.unchanged - nonfinite
    return min(1.0, max(0.0, 1 - (meeting.both_changed or 0.0) / changed)) if changed > 0 else None


def _grams(groups: Sequence[Group]) -> Array:
    """Dot products of all differences, from norms and cosines: shape (groups, models, models)."""
    norms = np.array([[each.norm for each in group.models] for group in groups])
    cosines = np.broadcast_to(np.eye(norms.shape[1]), (*norms.shape, norms.shape[1])).copy()
    if pairs := groups[0].pairs:
        places = [each.model for each in pairs], [each.other for each in pairs]
        cosines[:, places[0], places[1]] = [[each.cosine or 0.0 for each in group.pairs] for group in groups]
    grams: Array = cosines * norms[:, :, None] * norms[:, None, :]
    return grams


def _solved(grams: Array, products: Array) -> tuple[Array, Array]:
    """The weights of the nearest weighted sums, and whether there is only one; a model that is the base has none."""
    squares = np.diagonal(grams, axis1=1, axis2=2)
    moving, norms = squares > 0, np.sqrt(_positive(squares))
    cosines = np.where(np.eye(grams.shape[1], dtype=bool), 1.0, grams / norms[:, :, None] / norms[:, None, :])
    if not grams.shape[1]:
        return products, np.zeros(len(grams), bool)
    independent = moving.any(axis=1) & (np.linalg.eigvalsh(cosines)[:, 0] >= RANK)
    cosines[~independent] = np.eye(grams.shape[1])
    solved = np.linalg.solve(cosines, (products / norms)[:, :, None])[:, :, 0]
    return np.where(moving, solved / norms, 0.0), independent


def _positive(values: Array) -> Array:
    return np.where(values > 0, values, 1.0)


def _told(values: Array, defined: Array) -> list[Any]:
    """Numbers of Python in nested lists; None where they are undefined."""
    told = values.astype(object)
    told[~defined] = None
    found: list[Any] = told.tolist()
    return found
