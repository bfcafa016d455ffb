"""Compare results whose last bits may depend on the machine."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelfuse.dtypes import BF16, F16, F32, F64, DType
from modelfuse.kernels import Bytes
from modelfuse.kernels.arrays.numpy import NumpyLibrary

#: The spacing of a type's values relative to their size: the most that one rounding can differ by.
STEPS = {F64.name: 2.0**-52, F32.name: 2.0**-23, F16.name: 2.0**-10, BF16.name: 2.0**-7}


def apart(one: Bytes, other: Bytes, dtype: DType, tolerance: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which elements differ by more than one rounding plus ``tolerance`` × the largest; NaN differs from numbers.

    >>> one, other = (np.array(values, np.float32).view(np.uint8) for values in ([1, 2, 3], [1, 2.0000002, 4]))
    >>> apart(one, other, F32, 0.0)
    array([False, False,  True])
    """
    library = NumpyLibrary(0, 0)
    x, y = (library.cast(library.load(raw, dtype), "float64") for raw in (one, other))
    with np.errstate(all="ignore"):
        sizes = np.maximum(abs(x), abs(y))
        largest = np.max(sizes, initial=0.0, where=np.isfinite(sizes))
        near = abs(x - y) <= tolerance * largest + STEPS[dtype.name] * sizes
    differ: np.ndarray[Any, np.dtype[np.bool_]] = ~(near | (x == y) | (np.isnan(x) & np.isnan(y)))
    return differ
