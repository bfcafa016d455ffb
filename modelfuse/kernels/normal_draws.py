"""Normally distributed draws, bit-identical on every processor, from the uniform ones of ``methods/random.py``."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelfuse.kernels.elementary import log
from modelfuse.methods.random import SCALE, draws

Array = np.ndarray[Any, np.dtype[np.float64]]
#: Numerators and denominators of Wichura 1988, algorithm AS 241 (PPND7), Applied Statistics 37: the inverse normal
#: distribution function in the center, in the tails, and in the far tails.
_MIDDLE = ((3.3871327179, 50.434271938, 159.29113202, 59.109374720),
           (1.0, 17.895169469, 78.757757664, 67.187563600))  # fmt: skip
_TAIL = ((1.4234372777, 2.7568153900, 1.3067284816, 0.17023821103), (1.0, 0.73700164250, 0.12021132975))
_FAR = ((6.6579051150, 3.0812263860, 0.42868294337, 0.017337203997), (1.0, 0.24197894225, 0.012258202635))
#: Half the width of the middle, and where its fraction is read: 0.425² − q².
_HALF = 0.425


def normals(key: int, start: int, count: int) -> Array:
    """Standard normal draws for the elements ``start`` to ``start + count``, within ±5.5.

    >>> draws_of_three = normals(7, 0, 3)
    >>> bool((draws_of_three[1:] == normals(7, 1, 2)).all())
    True

    Args:
        key: The key of the random stream, from ``stream_key``.
        start: The index of the first element.
        count: The number of elements.
    """
    middle = draws(key, start, count).astype(np.float64) + (SCALE / 2 - 0.5)  # Strictly between −½ and ½.
    found = middle * _ratio(_HALF * _HALF - middle * middle, _MIDDLE)
    outside = np.abs(middle) > _HALF
    if outside.any():
        root = np.sqrt(-log(0.5 - np.abs(middle[outside])))
        size = np.where(root <= 5, _ratio(root - 1.6, _TAIL), _ratio(root - 5, _FAR))
        found[outside] = np.copysign(size, middle[outside])
    return found


def _ratio(x: Array, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> Array:
    upper, lower = (_polynomial(x, each) for each in coefficients)
    return upper / lower


def _polynomial(x: Array, coefficients: tuple[float, ...]) -> Array:
    result = np.full_like(x, coefficients[-1])
    for each in coefficients[-2::-1]:
        result = result * x + each
    return result
