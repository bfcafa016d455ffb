"""Dropping elements at random."""

from __future__ import annotations

import numpy as np

from modelfuse.methods.arrays import Array, scalar


def dare(x: Array, draws: Array, *, reserve_p: float = 0.7, rescale: bool = True) -> Array:
    """Keep each element with one probability and scale it up to keep the mean.

    Formula: x/p with probability p, else 0
    Paper: Yu et al. 2023, Language models are super Mario (DARE), arXiv:2311.03099

    Args:
        x: One model's tensor.
        draws: Uniform draws in [0, 1), float32, of the same shape.
        reserve_p: The probability p of keeping an element, in (0, 1].
        rescale: Divide what is kept by p.
    """
    kept = np.where(draws < np.float32(reserve_p), x, scalar(x, 0))
    return kept / scalar(x, reserve_p) if rescale else kept
