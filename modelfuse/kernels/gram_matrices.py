"""Gram matrices of the models' weight matrices, computed while rows are read, and norms computed from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np

from modelfuse.kernels import PassStep
from modelfuse.kernels.matrices import PANEL, SLICE, MatrixPart
from modelfuse.methods.decompositions import trace
from modelfuse.methods.spec import Algebra, Floats

#: A generator of steps that returns a float64 array.
Steps = Generator[PassStep, None, Floats]
#: Reads rows of a matrix, from one to another: steps, and after each the first row and values of its window.
Windows = Callable[[int, int], Iterator[PassStep | tuple[int, Floats]]]

#: Kinds of Gram matrices that do not tell the norm of the sum of the models.
BY_MODEL = ("each", "given")


def allocate_grams(part: MatrixPart, models: int) -> tuple[Floats, dict[tuple[int, int], Floats]]:
    """Zero Gram matrices: as one array, as methods take them, and as views by the indices of their two matrices."""
    kind, k = part.how.gram, part.k
    if kind == "pairs":
        pairs = np.zeros((models, models, k, k))
        return pairs, {(i, j): pairs[i, j] for i in range(models) for j in range(models)}
    if kind == "sum":
        whole = np.zeros((k, k))
        return whole, {(0, 0): whole}
    every = np.zeros((models, k, k))
    return every, {(i, i): every[i] for i in range(models)}


def gram_of_columns(windows: Windows, part: MatrixPart, models: int, algebra: Algebra) -> Steps:
    """Gram matrices of the columns: sums of products of hundreds or thousands of rows."""
    stacked, grams = allocate_grams(part, models)
    height = max(1, SLICE // part.width, part.k // 2)
    panel, filled = np.empty((1 + max(i for i, _ in grams), height, part.k)), 0

    def add() -> None:
        for (i, j), gram in grams.items():
            if i <= j:
                gram += algebra.product(panel[i, :filled].T, panel[j, :filled])

    for each in windows(int(part.rows[0]), int(part.rows[-1]) + 1):
        if isinstance(each, PassStep):
            yield each
            continue
        first, last, values = part.take(each[1], each[0])
        if filled + last - first > height:
            add()
            filled = 0
        for number, own in enumerate(values):
            panel[number, filled : filled + last - first] = own
        filled += last - first
    add()
    for (i, j), gram in grams.items():
        if i > j:
            gram[:] = grams[j, i].T
    return stacked


def gram_of_rows(windows: Windows, part: MatrixPart, models: int, algebra: Algebra) -> Steps:
    """Gram matrices of the rows: a panel of rows is multiplied by itself and by all rows after it."""
    stacked, grams = allocate_grams(part, models)
    number, width = 1 + max(i for i, _ in grams), part.columns.size
    height = min(max(1, max(part.k**2, PANEL) // (number * width)), part.k)
    panel = np.empty((number, height, width))
    for top in range(0, part.k, height):
        bottom = min(top + height, part.k)
        for each in windows(int(part.rows[top]), int(part.rows[-1]) + 1):
            if isinstance(each, PassStep):
                yield each
                continue
            first, last, values = part.take(each[1], each[0])
            known = min(last, bottom)
            for own, rows in zip(values, panel, strict=True):
                rows[first - top : known - top] = own[: max(known - first, 0)]
            for (i, j), gram in grams.items():
                gram[top:known, first:last] = algebra.product(panel[i, : known - top], values[j].T)
    for row in range(part.k):
        for (i, j), gram in grams.items():
            gram[row + 1 :, row] = grams[j, i][row, row + 1 :]
    return stacked


def even_weights(weights: Sequence[float]) -> Floats:
    """The models' weights, scaled to a mean of 1."""
    given = np.array(weights)
    with np.errstate(all="ignore"):
        even: Floats = given / given.mean()
    return even


def ratio(whole: float, made: float) -> float:
    """The ratio of two norms, given their squares; any number if the second is zero."""
    return math.sqrt(max(whole, 0.0) / made) if made > 0 else 1.0


def sum_of_squares(matrix: Floats) -> float:
    """In an order that depends on the shape alone."""
    sums, rows = list[float](), max(1, SLICE // matrix.shape[1])
    for first in range(0, len(matrix), rows):
        part = matrix[first : first + rows]
        sums += np.add.reduce(part * part, axis=0).tolist()
    return _exact(sums)


def square_of_sum(values: Sequence[Floats], weights: Sequence[float], kind: str) -> float:
    """The squared norm of the sum of the differences, with weights whose mean is 1.

    Args:
        values: Each model's differences, or for the kind ``sum`` their weighted sum.
        weights: The models' weights.
        kind: Of Gram matrices.
    """
    with np.errstate(all="ignore"):
        if kind == "sum":
            return sum_of_squares(values[0] * (len(weights) / sum(weights)))
        whole = np.zeros_like(values[0])
        for own, weight in zip(values, even_weights(weights), strict=True):
            whole += own * weight
        return sum_of_squares(whole)


def ratio_by_gram(grams: Floats, factors: Floats, kind: str, weights: Sequence[float], algebra: Algebra) -> float:
    """The norm of the weighted sum of the differences, divided by that of the merged difference.

    Args:
        grams: The Gram matrix of the weighted ``sum``, or those of all ``pairs``.
        factors: The factor K that multiplies each matrix.
        kind: ``sum`` or ``pairs``.
        weights: The models' weights; the sum uses them scaled to a mean of 1.
        algebra: What computes.
    """
    even = even_weights(weights)
    if kind == "sum":
        whole = trace(grams) * (len(weights) / sum(weights)) ** 2
        return ratio(whole, _dot(factors[0], algebra.product(grams, factors[0])))
    pairs = [(i, j) for i in range(len(factors)) for j in range(len(factors))]
    whole = sum(float(even[i]) * trace(grams[i, j]) * float(even[j]) for i, j in pairs)
    return ratio(whole, sum(_dot(factors[i], algebra.product(grams[i, j], factors[j])) for i, j in pairs))


def _dot(one: Floats, other: Floats) -> float:
    return _exact(np.add.reduce(one * other, axis=0).tolist())


def _exact(numbers: Sequence[float]) -> float:
    try:
        return math.fsum(numbers)
    except (OverflowError, ValueError):  # Of infinities.
        return math.nan
