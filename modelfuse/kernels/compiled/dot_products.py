"""Compiled loops over blocks for dot products of models (Gram matrices) and sums of terms."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelfuse.kernels.jit.compile import compile_kernel

Array = np.ndarray[Any, Any]

#: Running sums per dot product.
LANES = 16
#: Elements of a lane that are summed at a time.
GROUP = 8


@compile_kernel
def add_products(x: Array, models: int, size: int, lanes: Array, sums: Array, row: int, last: bool) -> None:
    """Add a block's products to the lanes or, with ``last``, fold the lanes into a row of sums.

    Each product has sixteen running sums, folded in a fixed order: bit-identical on any processor. Products of float32
    are exact in float64, and the rounding errors of their sums are far below float32's precision; for float64 the
    rounding errors are summed as well.

    Args:
        x: The models' elements, shape (rows, BLOCK); set to zero beyond ``size``.
        models: The number of models.
        size: The number of elements.
        lanes: float64, shape (2 · products, LANES): sums, then rounding errors.
        sums: float64, shape (rows, 2 · products): folded sums and rounding errors.
        row: The row of ``sums`` to write.
        last: Whether to fold instead of adding.
    """
    products = models * (models + 1) // 2
    if last:
        _fold(lanes, products, x.itemsize == 4, sums[row])
        return
    whole = -(-size // (GROUP * LANES)) * GROUP * LANES
    for model in range(models):
        for i in range(size, whole):
            x[model, i] = 0
    one, other = 0, 0
    for product in range(products):
        if x.itemsize == 4:
            _add(x[one], x[other], whole, lanes[product])
        else:
            _add_exactly(x[one], x[other], whole, lanes[product], lanes[product + products])
        if product < models - 1:
            one, other = one + 1, other + 1
        elif product == models - 1:
            one, other = 0, 1
        elif other == models - 1:
            one, other = one + 1, one + 2
        else:
            other += 1


@compile_kernel
def _fold(lanes: Array, products: int, exact: bool, sums: Array) -> None:
    for product in range(products):
        total = lost = 0.0
        for lane in range(LANES):
            value = lanes[product, lane]
            added = total + value
            lost += _error_of(total, value, added) + lanes[product + products, lane]
            total = added
        sums[product] = total
        sums[product + products] = 0.0 if exact else lost


@compile_kernel
def _add(one: Array, other: Array, size: int, lanes: Array) -> None:
    """Add a block's products to the lanes, several per lane while it is in a register."""
    for start in range(0, size, GROUP * LANES):
        a, b = one[start : start + GROUP * LANES], other[start : start + GROUP * LANES]
        for lane in range(LANES):
            total = lanes[lane]
            for i in range(0, GROUP * LANES, LANES):
                total += np.float64(a[i + lane]) * np.float64(b[i + lane])
            lanes[lane] = total


@compile_kernel
def _add_exactly(one: Array, other: Array, size: int, lanes: Array, losses: Array) -> None:
    """The same; the rounding error of each addition is added to ``losses``."""
    for start in range(0, size, GROUP * LANES):
        a, b = one[start : start + GROUP * LANES], other[start : start + GROUP * LANES]
        for lane in range(LANES):
            total, lost = lanes[lane], losses[lane]
            for i in range(0, GROUP * LANES, LANES):
                product = np.float64(a[i + lane]) * np.float64(b[i + lane])
                added = total + product
                lost += _error_of(total, product, added)
                total = added
            lanes[lane], losses[lane] = total, lost


@compile_kernel
def add_terms(rows: Array, terms: int, model: int, size: int, lanes: Array) -> None:
    """Add a block of a model's terms to the lanes, and the rounding errors to lanes of their own.

    Args:
        rows: The terms, shape (terms or more, BLOCK); set to zero beyond ``size``.
        terms: The number of terms.
        model: The index of the model.
        size: The number of elements.
        lanes: float64, shape (models · terms, 2, LANES): sums, and rounding errors.
    """
    whole = -(-size // (GROUP * LANES)) * GROUP * LANES
    for term in range(terms):
        for i in range(size, whole):
            rows[term, i] = 0
        add_values(rows[term], whole, lanes[model * terms + term])


@compile_kernel
def add_values(values: Array, size: int, lanes: Array) -> None:
    """Add values to lanes, and the rounding errors to lanes of their own: float64, shape (2, LANES)."""
    whole = size // (GROUP * LANES) * GROUP * LANES
    for start in range(0, whole, GROUP * LANES):
        several = values[start : start + GROUP * LANES]
        for lane in range(LANES):
            total, lost = lanes[0, lane], lanes[1, lane]
            for i in range(0, GROUP * LANES, LANES):
                value = np.float64(several[i + lane])
                added = total + value
                lost += _error_of(total, value, added)
                total = added
            lanes[0, lane], lanes[1, lane] = total, lost
    for i in range(whole, size):
        lane, value = i % LANES, np.float64(values[i])
        added = lanes[0, lane] + value
        lanes[1, lane] += _error_of(lanes[0, lane], value, added)
        lanes[0, lane] = added


@compile_kernel
def fold_terms(lanes: Array, sums: Array) -> None:
    """Fold the lanes of each term into its sum and rounding error: float64, shape (models · terms, 2)."""
    for term in range(lanes.shape[0]):
        total = lost = 0.0
        for lane in range(LANES):
            value = lanes[term, 0, lane]
            added = total + value
            lost += _error_of(total, value, added) + lanes[term, 1, lane]
            total = added
        sums[term, 0], sums[term, 1] = total, lost


@compile_kernel
def _error_of(a: float, b: float, added: float) -> float:
    """The rounding error of a + b: Knuth's two-sum (The Art of Computer Programming, volume 2, section 4.2.2)."""
    of_b = added - a
    return (a - (added - of_b)) + (b - of_b)
