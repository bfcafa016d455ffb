"""Exact sums, which do not depend on the order of summation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt


def total(x: npt.NDArray[np.floating[Any]]) -> float:
    """The sum of all elements, exact, then rounded once to float64; NaN if it has no finite value."""
    try:
        return math.fsum(x.ravel().tolist())
    except (OverflowError, ValueError):  # Infinities of both signs are a ValueError.
        return math.nan
