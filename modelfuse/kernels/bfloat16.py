"""bfloat16 with numpy, which has no such type: the upper halves of float32."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def from_bfloat16(halves: Array) -> Array:
    """The values of bfloat16 as float32.

    Args:
        halves: uint16, of any shape and byte order.
    """
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(values: Array) -> Array:
    """The nearest bfloat16 of float32 values, ties to even, as float32; NaN stays NaN."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return (np.where(nan, bits | np.uint32(0x400000), nearest) & np.uint32(0xFFFF0000)).view(np.float32)


def halves_of(values: Array) -> Array:
    """What is stored of float32 values that are bfloat16's: uint16."""
    return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
