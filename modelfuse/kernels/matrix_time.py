"""How long methods of whole matrices compute: counted in products, which are measured on this processor."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import numpy as np
from msgspec import Struct

from modelfuse.kernels.blas_threads import one_thread
from modelfuse.kernels.gram_matrices import BY_MODEL
from modelfuse.kernels.matrices import Matrices, MatrixPart, demand_of
from modelfuse.methods.applied import Applied

#: What a product of a matrix with itself takes, of which half is computed, beside another one of that size.
OWN = 0.65
#: Operations that take as long as reading an element and subtracting the base's.
ELEMENT = 170
#: The side of a matrix whose product is timed, and how often: the best counts.
SIDE, TIMES = 384, 4


class Computation(NamedTuple):
    """What one tensor takes.

    Attributes:
        operations: Multiplications and additions of float64, decompositions as the products that take as long.
        solved: How many matrices are decomposed.
        largest: The side of the largest one.
    """

    operations: float
    solved: int
    largest: int


class Expected(Struct, frozen=True):
    """What all tensors take.

    Attributes:
        seconds: About how long, with so many workers as there are.
        solved: How many matrices are decomposed.
        largest: The side of the largest one.
    """

    seconds: float
    solved: int
    largest: int


def computation_of(matrices: Matrices, method: Applied, models: int) -> Computation:
    """What the matrices of one tensor take."""
    how = method.combination.matrix
    assert how is not None
    largest, held = 0, demand_of(matrices, how, models).holds(matrices)
    operations: float = ELEMENT * matrices.unit * (models + 1) * 2
    for number, outputs in enumerate(matrices.outputs):
        part = MatrixPart(matrices, number, how, models)
        product, square = 2.0 * outputs.size * matrices.inputs * part.k, 2.0 * part.k**3
        kind, own = part.how.gram, 1.0 if part.how.gram == "sum" else float(models)
        by_model, shared = kind in BY_MODEL, part.how.fixed_order and kind in BY_MODEL
        grams: float = {"given": 0.0, "pairs": models * (models - 1) / 2 + OWN * models}.get(kind, OWN * own)
        made = own + float(shared and held)
        if not held:
            again = method.norm is not None
            made += own * (by_model and again)
            operations += square * (own * shared + (0 if by_model or not again else own * own))
        operations += product * (grams + made) + square * part.how.work(models)
        largest = max(largest, part.k)
    return Computation(operations * matrices.units, len(matrices.outputs) * matrices.units, largest)


def expected(computations: Iterable[Computation], workers: int) -> Expected | None:
    """How long all take; None if there are none. One worker does all of a tensor."""
    every = [*computations]
    if not every:
        return None
    most = max(each.operations for each in every)
    seconds = max(most, sum(each.operations for each in every) / workers) / rate()
    return Expected(seconds, sum(each.solved for each in every), max(each.largest for each in every))


@cache
def rate() -> float:
    """Operations a second of one thread in products of matrices."""
    matrix, best = np.ones((SIDE, SIDE)), 1.0
    with one_thread():
        for _ in range(TIMES):
            begun = time.perf_counter()
            matrix @ matrix
            best = min(best, time.perf_counter() - begun)
    return 2.0 * SIDE**3 / best
