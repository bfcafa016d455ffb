"""Compute how much of each model the output of a merge contains, from a comparison with the output as last model.

τᵢ is the difference of model i to the base, δ that of the output. All measures follow from their dot products and from
counts of changed elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Struct

from modelfuse.inspection.diff_measures import ModelPair, TensorGroup

Array = np.ndarray[Any, Any]
Number = float | None

#: The least eigenvalue of the cosines for which differences count as linearly independent.
RANK = 1e-9


class ModelOutcome(Struct, frozen=True):
    """What the output contains of one model's difference.

    Attributes:
        projection: ⟨δ, τᵢ⟩ / ‖τᵢ‖²: how many times its difference is in the output's, including what other models
            contribute in its direction.
        coefficient: cᵢ of the weighted sum Σ cⱼτⱼ that is nearest to δ: its own contribution. None if the models'
            differences are linearly dependent.
        left: √(1 − cos²) of δ and τᵢ: the share of δ orthogonal to τᵢ.
        dropped: Of the elements that it changes, the share that equals the base in the output.
        reversed: Of the elements that both change, the share with opposite signs.
    """

    projection: float | None
    coefficient: float | None
    left: float | None
    dropped: float | None
    reversed: float | None


class MergeOutcome(Struct, frozen=True):
    """What the output contains of its inputs, in a group of tensors.

    Attributes:
        name: As of the :class:`TensorGroup`.
        stack: As of the group.
        layer: As of the group.
        module: As of the group.
        elements: The number of elements.
        relative: ‖δ‖ / ‖b‖.
        unchanged: The share of elements that equal the base's.
        residual: ‖δ − Σ cᵢτᵢ‖ / ‖δ‖: the share that is not a weighted sum of the models' differences, because elements
            were dropped, outvoted or rounded.
        cancelled: max(0, 1 − ‖Σ cᵢτᵢ‖² / Σ ‖cᵢτᵢ‖²): what the models' contributions cancel of each other.
        nonfinite: Elements of the output that are NaN or infinite.
        models: The outcome of each model.
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
    models: tuple[ModelOutcome, ...]


def outcome_of(group: TensorGroup) -> MergeOutcome:
    """The outcome in a group of tensors whose last model is the output."""
    return outcomes_of([group])[0]


def outcomes_of(groups: Sequence[TensorGroup]) -> tuple[MergeOutcome, ...]:
    """The outcomes in several groups of the same models."""
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
        _listed(np.sqrt(rest / _positive(square)), known),
        _listed(np.maximum(0.0, 1 - both / _positive(alone)), known & (alone > 0)),
        _listed(products / _positive(np.diagonal(models, axis1=1, axis2=2)), np.diagonal(models, axis1=1, axis2=2) > 0),
        _listed(coefficients, np.broadcast_to(independent[:, None], coefficients.shape)),
    )
    return tuple(_outcome(group, *row) for group, *row in zip(groups, *columns, strict=True))


def _outcome(
    group: TensorGroup,
    residual: Number,
    cancelled: Number,
    projections: Sequence[Number],
    coefficients: Sequence[Number],
) -> MergeOutcome:
    own, count = group.models[-1], len(group.models) - 1
    taken = []
    for model, projection, coefficient in zip(range(count), projections, coefficients, strict=True):
        meeting = group.pair(model, count)
        left = None if meeting.cosine is None else max(0.0, 1 - meeting.cosine**2) ** 0.5
        taken.append(
            ModelOutcome(projection, coefficient, left, _dropped(group, model, meeting), meeting.sign_conflict)
        )
    return MergeOutcome(
        group.name, group.stack, group.layer, group.module, group.elements, own.relative, own.unchanged, residual,
        cancelled, own.nonfinite, tuple(taken),
    )  # fmt: skip


def _dropped(group: TensorGroup, model: int, meeting: ModelPair) -> Number:
    own = group.models[model]
    if own.unchanged is None or own.unchanged >= 1:
        return None
    nonfinite = own.nonfinite / group.elements if group.elements else 0.0
    changed = 1 - own.unchanged - nonfinite
    return min(1.0, max(0.0, 1 - (meeting.both_changed or 0.0) / changed)) if changed > 0 else None


def _grams(groups: Sequence[TensorGroup]) -> Array:
    """Dot products of all differences, from norms and cosines: shape (groups, models, models)."""
    norms = np.array([[each.norm for each in group.models] for group in groups])
    cosines = np.broadcast_to(np.eye(norms.shape[1]), (*norms.shape, norms.shape[1])).copy()
    if pairs := groups[0].pairs:
        places = [each.model for each in pairs], [each.other for each in pairs]
        cosines[:, places[0], places[1]] = [[each.cosine or 0.0 for each in group.pairs] for group in groups]
    grams: Array = cosines * norms[:, :, None] * norms[:, None, :]
    return grams


def _solved(grams: Array, products: Array) -> tuple[Array, Array]:
    """The weights of the nearest weighted sums, and whether they are unique. That of the base is 0."""
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


def _listed(values: Array, defined: Array) -> list[Any]:
    """Nested lists of Python numbers; None where they are undefined."""
    told = values.astype(object)
    told[~defined] = None
    found: list[Any] = told.tolist()
    return found
