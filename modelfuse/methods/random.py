"""Counter-based random draws for DARE and magnitude pruning, independent of the order of elements.

A draw is a pure function of (seed, model number, tensor name, element number). Splitmix64
(Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") visits the numbers
``key + (i + 1) * GAMMA`` and mixes each to 64 random bits; their low half is the draw of element 2i, the
high half that of element 2i + 1. Any element can be drawn without its predecessors.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
#: A draw keeps the 24 high bits of 32, so that it is exact in float32.
SHIFT = 8
SCALE = 2.0**-24


def stream_key(seed: int, model: int, name: str) -> int:
    """The 64-bit key of one tensor of one model: BLAKE2b of the three.

    Args:
        seed: The recipe's seed.
        model: The model's position in ``model_path_list``, from 0.
        name: The tensor's name in the output.
    """
    text = f"{seed}\0{model}\0{name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def draws(key: int, start: int, count: int) -> npt.NDArray[np.float32]:
    """Uniform draws in [0, 1) for the elements ``start`` to ``start + count``.

    Returns:
        float32, shape (count,), multiples of 2⁻²⁴.
    """
    pairs = np.arange(start // 2, (start + count + 1) // 2, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = np.uint64(key) + (pairs + np.uint64(1)) * np.uint64(GAMMA)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
        z ^= z >> np.uint64(31)
    halves = np.stack([z & np.uint64(0xFFFFFFFF), z >> np.uint64(32)], axis=1).ravel()[start % 2 :][:count]
    return (halves >> np.uint64(SHIFT)).astype(np.float32) * np.float32(SCALE)
