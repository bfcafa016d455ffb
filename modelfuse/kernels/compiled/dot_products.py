"""Norms and dot products of two models, for slerp: compiled loops over raw bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelfuse.kernels.compiled.direct_reads import BLOCK
from modelfuse.kernels.compiled.merge_loops import CHUNK, Room, Sparsifier, Stored, load, sparsify
from modelfuse.kernels.jit.compile import compile_kernel

Array = np.ndarray[Any, Any]

#: Running sums of a product.
LANES = 16
#: Elements of a lane that are added up at a time.
GROUP = 8


@compile_kernel
def dot_products(data: Stored, first: int, length: int, room: Room, how: Sparsifier, lanes: Array, sums: Array) -> None:
    """x₁·x₁, x₂·x₂ and x₁·x₂ of two models, and what they lost: six columns, a row for every CHUNK elements.

    Sixteen running sums a product, folded in a fixed order: the same bits on any processor. Products of float32 are
    exact, and what their sums lose is far less than a float32 can tell; for float64 all that is lost is added up, too.
    """
    x = room.x
    for chunk in range(0, length, CHUNK):
        lanes[:] = 0.0
        for start in range(chunk, min(chunk + CHUNK, length), BLOCK):
            size = min(BLOCK, length - start)
            load(data, start, size, room, length)
            for model in range(data.inputs.models):
                sparsify(how, model, first + start, size, room)
            whole = -(-size // (GROUP * LANES)) * GROUP * LANES
            for row in range(2):
                for i in range(size, whole):
                    x[row, i] = 0
            for product in range(3):
                one, other = x[1 if product == 1 else 0], x[0 if product == 0 else 1]
                if x.itemsize == 4:
                    _add_products(one, other, whole, lanes[product])
                else:
                    _add_products_exactly(one, other, whole, lanes[product], lanes[product + 3])
        for product in range(3):
            total = lost = 0.0
            for lane in range(LANES):
                value = lanes[product, lane]
                added = total + value
                lost += _error_of(total, value, added) + lanes[product + 3, lane]
                total = added
            sums[chunk // CHUNK, product] = total
            sums[chunk // CHUNK, product + 3] = 0.0 if x.itemsize == 4 else lost


@compile_kernel
def _add_products(one: Array, other: Array, size: int, lanes: Array) -> None:
    """Add a block's products to the lanes, several to each while they are in registers."""
    for start in range(0, size, GROUP * LANES):
        a, b = one[start : start + GROUP * LANES], other[start : start + GROUP * LANES]
        for lane in range(LANES):
            total = lanes[lane]
            for i in range(0, GROUP * LANES, LANES):
                total += np.float64(a[i + lane]) * np.float64(b[i + lane])
            lanes[lane] = total


@compile_kernel
def _add_products_exactly(one: Array, other: Array, size: int, lanes: Array, losses: Array) -> None:
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
def _error_of(a: float, b: float, added: float) -> float:
    """What was lost when two numbers were added: Knuth's two-sum (The Art of Computer Programming, 2, 4.2.2)."""
    of_b = added - a
    return (a - (added - of_b)) + (b - of_b)
