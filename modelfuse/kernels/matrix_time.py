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
from modelfuse.kernels.matrices import Matrices, MatrixPart
from modelfuse.methods.applied import Applied

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
    assert method.combination.matrix is not None
    operations, largest = 0.0, 0
    for number, outputs in enumerate(matrices.outputs):
        part = MatrixPart(matrices, number, method.combination.matrix, models)
        product, own = 2.0 * outputs.size * matrices.inputs * part.k, 1 if part.how.gram == "sum" else models
        grams = {"pairs": models * (models + 1) / 2, "given": 0}.get(part.how.gram, own)
        made = own * (2 if method.norm is not None and part.how.gram in BY_MODEL else 1)
        operations += product * (grams + made) + 2.0 * part.k**3 * part.how.work(models)
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
