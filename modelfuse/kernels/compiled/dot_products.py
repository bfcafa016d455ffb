"""Dot products of models, for Gram matrices, and sums of terms: compiled loops over blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelfuse.kernels.jit.compile import compile_kernel

Array = np.ndarray[Any, Any]

#: Running sums of a product.
LANES = 16
#: Elements of a lane that are added up at a time.
GROUP = 8


@compile_kernel
def add_products(x: Array, models: int, size: int, lanes: Array, sums: Array, row: int, last: bool) -> None:
    """Add a block's products to the lanes; at the ``last`` block's end, fold them into a row of sums.

    Sixteen running sums a product, folded in a fixed order: the same bits on any processor. Products of float32 are
    exact, and what their sums lose is far less than a float32 can tell; for float64 all that is lost is added up, too.

    Args:
        x: The models' elements, shape (rows, BLOCK); set to zero beyond ``size``.
        models: The number of models.
        size: The number of elements.
        lanes: float64, shape (2 · products, LANES): sums, then what was lost.
        sums: float64, shape (rows, 2 · products): the same, folded.
        row: Which row of sums.
        last: Whether to fold, instead of adding.
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
    """Add a block's products to the lanes, several to each while they are in registers."""
    for start in range(0, size, GROUP * LANES):
        a, b = one[start : start + GROUP * LANES], other[start : start + GROUP * LANES]
        for lane in range(LANES):
            total = lanes[lane]
            for i in range(0, GROUP * LANES, LANES):
                total += np.float64(a[i + lane]) * np.float64(b[i + lane])
            lanes[lane] = total


@compile_kernel
def _add_exactly(one: Array, other: Array, size: int, lanes: Array, losses: Array) -> None:
    """The same; what each addition loses is added to ``losses``."""
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
    """Add a block of a model's terms to the lanes, and what each addition loses to others.

    Args:
        rows: The terms, from the second row on, shape (1 + terms, BLOCK); set to zero beyond ``size``.
        terms: The number of terms.
        model: The model's number.
        size: The number of elements.
        lanes: float64, shape (models · terms, 2, LANES): sums, and what was lost.
    """
    whole = -(-size // LANES) * LANES
    for term in range(terms):
        values, own, losses = rows[1 + term], lanes[model * terms + term, 0], lanes[model * terms + term, 1]
        for i in range(size, whole):
            values[i] = 0
        for start in range(0, whole, LANES):
            for lane in range(LANES):
                value = np.float64(values[start + lane])
                added = own[lane] + value
                losses[lane] += _error_of(own[lane], value, added)
                own[lane] = added


@compile_kernel
def fold_terms(lanes: Array, sums: Array) -> None:
    """Fold the lanes of each term into one sum and what was lost, float64, shape (models · terms, 2)."""
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
    """What was lost when two numbers were added: Knuth's two-sum (The Art of Computer Programming, 2, 4.2.2)."""
    of_b = added - a
    return (a - (added - of_b)) + (b - of_b)
