"""Exponential and logarithm from basic arithmetic: those of libraries differ in the last bit between processors."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

#: ln 2 in two parts; the first has trailing zeros, so that its integer multiples are exact.
LN2, LN2_REST = 0.6931471803691238, 1.9082149292705877e-10
#: Taylor coefficients 1/0!, 1/1!, …, 1/13!: enough between −ln 2 / 2 and ln 2 / 2.
FACTORS = tuple(1 / float(np.prod(np.arange(1.0, n + 1))) for n in range(14))
#: 1 / ln 2.
LOG2_E = 1 / (LN2 + LN2_REST)
#: The least exponent of e that does not count as zero.
LOWEST = -700.0
#: Coefficients 1, 1/2, … of ln(1 + x): enough between −NEAR and NEAR.
NEAR, NEAR_FACTORS = 2.0**-5, tuple(1 / n for n in range(1, 11))
#: Coefficients 1, 1/3, 1/5, … of artanh: enough for mantissas between √½ and √2.
ODD = tuple(1 / (2 * n + 1) for n in range(12))


def exp(x: Array) -> Array:
    """e to the power of each element; 0 below −700.

    >>> round(float(exp(np.array([1.0]))[0]), 14)
    2.71828182845905
    """
    with np.errstate(all="ignore"):
        finite = np.where(np.isfinite(x), x, 0.0)
        power = np.rint(finite * LOG2_E)
        rest = (finite - power * LN2) - power * LN2_REST
        result = np.full_like(rest, FACTORS[-1])
        for factor in FACTORS[-2::-1]:
            result = result * rest + factor
        scaled = np.ldexp(result, np.clip(power, -1100, 1100).astype(np.int32))
        return np.where(x < LOWEST, 0.0, np.where(np.isfinite(x), scaled, x))


def exp_near_zero(x: Array) -> Array:
    """e to the power of numbers between −NEAR and NEAR.

    >>> round(float(exp_near_zero(np.array([0.01]))[0]), 14)
    1.01005016708417
    """
    with np.errstate(all="ignore"):
        result = np.full_like(x, FACTORS[8])
        for factor in FACTORS[7::-1]:
            result = result * x + factor
        return result


def log_near_one(x: Array) -> Array:
    """The natural logarithm of 1 + x, for numbers between −NEAR and NEAR.

    >>> round(float(log_near_one(np.array([0.01]))[0]), 14)
    0.00995033085317
    """
    with np.errstate(all="ignore"):
        result = np.full_like(x, NEAR_FACTORS[-1])
        for factor in NEAR_FACTORS[-2::-1]:
            result = factor - x * result
        return x * result


def log(x: Array) -> Array:
    """The natural logarithm of positive, normal numbers; NaN of all others.

    >>> round(float(log(np.array([10.0]))[0]), 14)
    2.30258509299405
    """
    with np.errstate(all="ignore"):
        known = np.isfinite(x) & (x > 0)
        mantissa, power = np.frexp(np.where(known, x, 1.0))
        small = mantissa < np.sqrt(0.5)
        mantissa, power = np.where(small, mantissa * 2, mantissa), power - small
        ratio = (mantissa - 1) / (mantissa + 1)
        square = ratio * ratio
        result = np.full_like(ratio, ODD[-1])
        for factor in ODD[-2::-1]:
            result = result * square + factor
        return np.where(known, power * LN2 + (power * LN2_REST + 2 * ratio * result), np.nan)
