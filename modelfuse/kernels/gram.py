"""Dot products of all pairs of models: their order, and the Gram matrix made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from modelfuse.methods.arrays import total

Array = np.ndarray[Any, Any]


def pairs_of(models: int) -> list[tuple[int, int]]:
    """The pairs of models in the order of their dot products: each model with itself, then pairs of two models."""
    own = [(model, model) for model in range(models)]
    return own + [(one, other) for one in range(models) for other in range(one + 1, models)]


def gram_of(models: int, parts: Sequence[Array]) -> Array:
    """The Gram matrix from partial sums of dot products, in the order of :func:`pairs_of`."""
    gram = np.empty((models, models))
    for (one, other), part in zip(pairs_of(models), parts, strict=True):
        gram[one, other] = gram[other, one] = total(part)
    return gram
