"""bfloat16 in numpy, which has no such type: the upper halves of float32 values."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def from_bfloat16(halves: Array, out: Array | None = None) -> Array:
    """Decode bfloat16 to float32.

    Args:
        halves: uint16, of any shape and byte order.
        out: Receives the values, float32, of the same shape; None: a new array.
    """
    bits = None if out is None else out.view(np.uint32)
    found: Array = np.left_shift(halves, 16, out=bits, dtype=np.uint32).view(np.float32)
    return found


def to_bfloat16(values: Array) -> Array:
    """Round float32 values to bfloat16, ties to even; the result is float32, NaN stays NaN."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return (np.where(nan, bits | np.uint32(0x400000), nearest) & np.uint32(0xFFFF0000)).view(np.float32)


def halves_of(values: Array) -> Array:
    """Encode float32 values that are exact in bfloat16: uint16."""
    return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
