"""Dropping elements at random, the small ones more often."""

from __future__ import annotations

import numpy as np

from modelfuse.methods.arrays import Array, scalar


def magprune(x: Array, draws: Array, *, reserve_p: float = 0.7, epsilon: float = 0.14, rescale: bool = True) -> Array:
    """Drop each element with a probability that grows with its rank by magnitude (DELLA's MagPrune).

    Formula: dropped with probability d = (1−p) − ε/2 + ε·r/n, r the rank by |x| from 0, the largest; else x/(1−d)
    Paper: Deep et al. 2024, DELLA-Merging, arXiv:2406.11617

    Args:
        x: One model's tensor. A tensor of zeros stays.
        draws: Uniform draws in [0, 1), float32, of the same shape.
        reserve_p: The mean probability p of keeping an element; p ± ε/2 must lie in (0, 1).
        epsilon: The spread ε between the largest and the smallest element.
        rescale: Divide what is kept by the probability of keeping it.
    """
    if not x.any():
        return x
    magnitudes = np.abs(x).ravel()
    order = np.sort(magnitudes)
    larger = x.size - np.searchsorted(order, magnitudes, side="right")
    equal = x.size - np.searchsorted(order, magnitudes, side="left") - larger
    ranks = (larger + (equal - 1) / 2).reshape(x.shape)
    keep = keep_probability(ranks, x.size, reserve_p, epsilon)
    kept = np.where(draws < keep.astype(np.float32), x, scalar(x, 0))
    return kept / keep.astype(x.dtype) if rescale else kept


def keep_probability(ranks: Array, size: int, reserve_p: float, epsilon: float) -> Array:
    """The probability of keeping the elements of these ranks (descending by magnitude, from 0).

    Equal magnitudes share the mean rank of their group.
    """
    probabilities: Array = reserve_p + epsilon / 2 - epsilon * ranks / size
    return probabilities
