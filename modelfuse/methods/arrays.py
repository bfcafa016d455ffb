"""The few array operations that the definitions share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

#: A float32 or float64 array; its dtype is the one that arithmetic runs in.
Array = npt.NDArray[np.floating[Any]]


def scalar(like: Array, value: float) -> np.floating[Any]:
    """A number rounded once into the type that ``like`` computes in."""
    number: np.floating[Any] = like.dtype.type(value)
    return number


def total(x: Array) -> float:
    """The sum of all elements, exact, then rounded once to float64; NaN if it has no finite value."""
    try:
        return math.fsum(x.ravel().tolist())
    except (OverflowError, ValueError):  # Infinities of both signs are a ValueError.
        return math.nan
