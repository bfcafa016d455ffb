"""Place the models and the base in a plane by their distances (classical multidimensional scaling)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from modelfuse.inspection.diff_result import TensorGroup

#: The margin around the points, relative to their extent.
MARGIN = 0.18


def positions_of(group: TensorGroup, names: Sequence[str], base: str) -> dict[str, Any] | None:
    """The points in a plane whose distances approximate those of the models and the base.

    Args:
        group: The measures.
        names: The names of the models.
        base: The name of the base.

    Returns:
        The points, the share of the squared distances that the plane shows, and the centre and extent of the part to
        show; None if all distances are zero.
    """
    squares = _distances(group)
    count = len(squares)
    center = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(-center @ squares @ center / 2)
    values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
    if count < 2 or not values[0] > 0:
        return None
    # The sign of an eigenvector depends on the library.
    for column in range(2):
        vectors[:, column] *= 1 if vectors[np.abs(vectors[:, column]).argmax(), column] > 0 else -1
    points = vectors[:, :2] * np.sqrt(values[:2])
    rows = [
        {"x": float(x), "y": float(y), "name": name, "kind": kind}
        for (x, y), name, kind in zip(points, (*names, base), (*("model",) * (count - 1), "base"), strict=True)
    ]
    low, high = points.min(axis=0), points.max(axis=0)
    return {
        "points": rows,
        "share": float(values[:2].sum() / values.sum()),
        "center": [float(each) for each in (low + high) / 2],
        "span": [float(each) for each in (high - low) * (1 + 2 * MARGIN)],
    }


def _distances(group: TensorGroup) -> np.ndarray:
    """Squared distances between the models and, last, the base."""
    count = len(group.models)
    norms = np.array([*(each.norm for each in group.models), 0.0])
    gram = np.diag(norms**2)
    for pair in group.pairs:
        gram[pair.model, pair.other] = (pair.cosine or 0.0) * norms[pair.model] * norms[pair.other]
    own = np.diag(gram)
    found: np.ndarray = (own[:, None] + own[None, :] - 2 * gram).clip(min=0)
    assert found.shape == (count + 1, count + 1)
    return found
