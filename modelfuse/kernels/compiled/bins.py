"""Magnitudes counted in bins of some leading bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelfuse.kernels.arrays import plain
from modelfuse.kernels.jit.compile import compile_kernel

Array = np.ndarray[Any, np.dtype[Any]]


@compile_kernel(plain=plain.count_bins)
def count_bins(bits: Array, shift: int, counts: Array) -> None:
    """Count the bits of magnitudes without their last ones; models in turn, as a count waits for the one before it.

    Args:
        bits: int32, shape (models, elements), of no sign.
        shift: How many bits to leave out.
        counts: int64, shape (models, bins); is added to.
    """
    models, elements = bits.shape
    for element in range(elements):
        for model in range(models):
            counts[model, bits[model, element] >> shift] += 1
