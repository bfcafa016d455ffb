"""The functions of :mod:`modelfuse.kernels.elementary` for single numbers, bit-identical, in compiled loops."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelfuse.kernels.compiled.merge_loops import choose
from modelfuse.kernels.elementary import FACTORS, LN2, LN2_REST, LOG2_E, LOWEST, NEAR_FACTORS, ODD
from modelfuse.kernels.jit.compile import compile_kernel

# Polynomials are written out, as loops over their factors would keep loops over elements from being vectorized.
#: Adding it to a number rounds that to the nearest integer, ties to even, which its low bits then hold.
ROUNDING = 1.5 * 2.0**52
#: The bias of the exponent, and the bits below it.
BIAS, MANTISSA = 1023, 52
HALF_ROOT = np.sqrt(0.5)


@compile_kernel
def exp(x: float) -> Any:
    """e to the power of a number whose result is finite."""
    rounded = x * LOG2_E + ROUNDING
    power = rounded - ROUNDING
    rest = (x - power * LN2) - power * LN2_REST
    result = FACTORS[13]
    result = result * rest + FACTORS[12]
    result = result * rest + FACTORS[11]
    result = result * rest + FACTORS[10]
    result = result * rest + FACTORS[9]
    result = result * rest + FACTORS[8]
    result = result * rest + FACTORS[7]
    result = result * rest + FACTORS[6]
    result = result * rest + FACTORS[5]
    result = result * rest + FACTORS[4]
    result = result * rest + FACTORS[3]
    result = result * rest + FACTORS[2]
    result = result * rest + FACTORS[1]
    result = result * rest + FACTORS[0]
    scale = np.int64((np.float64(rounded).view(np.int64) + BIAS) << MANTISSA)
    result = result * scale.view(np.float64)
    return choose(x < LOWEST, 0.0, result)


@compile_kernel
def exp_near_zero(x: float) -> Any:
    """e to the power of a number between −NEAR and NEAR."""
    result = FACTORS[8]
    result = result * x + FACTORS[7]
    result = result * x + FACTORS[6]
    result = result * x + FACTORS[5]
    result = result * x + FACTORS[4]
    result = result * x + FACTORS[3]
    result = result * x + FACTORS[2]
    result = result * x + FACTORS[1]
    return result * x + FACTORS[0]


@compile_kernel
def log_near_one(x: float) -> Any:
    """The natural logarithm of 1 + x, for numbers between −NEAR and NEAR."""
    result = NEAR_FACTORS[9]
    result = NEAR_FACTORS[8] - x * result
    result = NEAR_FACTORS[7] - x * result
    result = NEAR_FACTORS[6] - x * result
    result = NEAR_FACTORS[5] - x * result
    result = NEAR_FACTORS[4] - x * result
    result = NEAR_FACTORS[3] - x * result
    result = NEAR_FACTORS[2] - x * result
    result = NEAR_FACTORS[1] - x * result
    result = NEAR_FACTORS[0] - x * result
    return x * result


@compile_kernel
def log(x: float) -> Any:
    """The natural logarithm of a positive, normal number; NaN of all others."""
    if not (x > 0 and x - x == 0):
        return np.nan
    bits = np.float64(x).view(np.int64)
    power = np.float64((bits >> MANTISSA) - (BIAS - 1))
    mantissa = np.int64((bits & ((1 << MANTISSA) - 1)) | ((BIAS - 1) << MANTISSA)).view(np.float64)
    if mantissa < HALF_ROOT:
        mantissa, power = mantissa * 2, power - 1
    ratio = (mantissa - 1) / (mantissa + 1)
    square = ratio * ratio
    result = ODD[11]
    result = result * square + ODD[10]
    result = result * square + ODD[9]
    result = result * square + ODD[8]
    result = result * square + ODD[7]
    result = result * square + ODD[6]
    result = result * square + ODD[5]
    result = result * square + ODD[4]
    result = result * square + ODD[3]
    result = result * square + ODD[2]
    result = result * square + ODD[1]
    result = result * square + ODD[0]
    return power * LN2 + (power * LN2_REST + 2 * ratio * result)


@compile_kernel
def key_of(x: float) -> Any:
    """An integer that sorts like the number."""
    bits = np.float64(x).view(np.int64)
    return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)


@compile_kernel
def of_key(key: int) -> Any:
    """The number of such an integer."""
    return np.int64(key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).view(np.float64)
