"""Keeping the largest elements."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np

from modelfuse.methods.arrays import Array, scalar, total

#: Sums of magnitudes below this are not rescaled.
MIN_SUM = 1e-8


def trim(x: Array, *, reserve_p: float = 0.7, rescale: bool = True) -> Array:
    """Zero all but the largest share of the elements; rescale to the magnitude there was before.

    Formula: keep |x| ≥ the (1−p) quantile of |x|; × Σ|x| before ÷ Σ|x| after
    Paper: Yadav et al. 2023, TIES-Merging, arXiv:2306.01708

    Args:
        x: One model's tensor.
        reserve_p: The share p that is kept, in (0, 1].
        rescale: Restore the sum of magnitudes, where both sums are at least 1e-8.
    """
    magnitudes = np.abs(x)
    threshold = np.sort(magnitudes, axis=None)[kept_from(x.size, reserve_p)] if x.size else scalar(x, 0)
    kept = magnitudes >= threshold
    result = np.where(kept, x, scalar(x, 0))
    if rescale:
        result = result * scalar(x, scale(total(magnitudes), total(magnitudes[kept])))
    return result


def kept_from(size: int, reserve_p: float) -> int:
    """The rank, ascending from 0, of the smallest magnitude that is kept.

    The quantile lies at position (1−p)(size−1). Between two order statistics it is above the lower
    one, and nothing lies between them: so what is kept starts at the next whole rank. The share is
    taken as the decimal the user wrote, so that 0.7 of 11 elements starts at rank 3, not 4.
    """
    dropped, of = _dropped(float(reserve_p))
    return -(-dropped * (size - 1) // of)


@lru_cache
def _dropped(reserve_p: float) -> tuple[int, int]:
    return (1 - Fraction(repr(reserve_p))).as_integer_ratio()


def scale(before: float, after: float) -> float:
    """The factor that restores the sum of magnitudes; 1 where a sum is too small or not finite."""
    return before / after if MIN_SUM <= before < math.inf and after >= MIN_SUM else 1.0
