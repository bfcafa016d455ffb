"""Count magnitudes in bins by their leading bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelfuse.kernels.arrays import plain
from modelfuse.kernels.jit.compile import compile_kernel

Array = np.ndarray[Any, np.dtype[Any]]


@compile_kernel(plain=plain.count_bins)
def count_bins(bits: Array, shift: int, counts: Array) -> None:
    """Count magnitudes by their bits without the last ``shift`` ones.

    Models alternate element by element: consecutive increments of one counter would wait for each other.

    Args:
        bits: int32, shape (models, elements): bits of magnitudes, with the sign bit clear.
        shift: The number of low bits to drop.
        counts: int64, shape (models, bins); incremented in place.
    """
    models, elements = bits.shape
    for element in range(elements):
        for model in range(models):
            counts[model, bits[model, element] >> shift] += 1
