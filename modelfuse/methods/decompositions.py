"""Decompositions of Gram matrices and whitening, shared by whole-matrix methods."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from modelfuse.methods.spec import Algebra, Floats

#: Singular values below this share of the largest one are rounding errors.
NOISE = 1e-6


def trace(matrix: Floats) -> float:
    """The sum of the diagonal, rounded once; NaN if any of it is not finite."""
    diagonal: Floats = np.diagonal(matrix)
    return math.fsum(diagonal.tolist()) if np.isfinite(diagonal).all() else math.nan


def directions(algebra: Algebra, gram: Floats, most: int, least: float = 0.0) -> tuple[Floats, Floats]:
    """Right singular vectors, shape (k, number), and singular values, descending, of a matrix with this Gram matrix.

    Args:
        algebra: What computes.
        gram: The Gram matrix.
        most: The most vectors.
        least: Singular values below this are rounding errors too, for the remainder of a larger matrix.
    """
    squares, vectors = algebra.eigh(gram)
    sigma = np.sqrt(np.maximum(squares[::-1], 0))
    number = min(most, int(np.count_nonzero(sigma > max(NOISE * sigma[0], least))))
    return vectors[:, ::-1][:, :number], sigma[:number]


def inverse_root(algebra: Algebra, square: Floats) -> Floats:
    """square^(−1/2) of a Gram matrix (pseudoinverse: zero in its null space)."""
    vectors, sigma = directions(algebra, square, len(square))
    half = vectors / np.sqrt(sigma)
    return algebra.product(half, half.T)


def whitened(algebra: Algebra, grams: Floats, left: Sequence[Floats], right: Floats, sizes: Floats) -> Floats:
    """The factors of the models for Ũ·diag(sizes)·Ṽᵀ, with Ũ and Ṽ the orthonormal matrices nearest to U and V.

    Args:
        algebra: What computes.
        grams: Gram matrices of all pairs of the models' matrices A, shape (models, models, k, k).
        left: One matrix X per model, shape (k, number); U = Σ A·X.
        right: V, shape (k, number).
        sizes: One factor per column of U and V.
    """
    number, product = right.shape[1], algebra.product
    if not number:
        return np.zeros((len(left), len(right), len(right)))
    # Models may have a few columns of U each, and zeros in the others.
    own = [(columns, each[:, columns]) for each in left for columns in [np.flatnonzero(each.any(axis=0))]]
    square = np.zeros((number, number))
    for i, (rows, one) in enumerate(own):
        for j, (columns, other) in enumerate(own[i:], i):
            part = product(one.T, product(grams[i, j], other))
            square[np.ix_(rows, columns)] += part
            if i != j:
                square[np.ix_(columns, rows)] += part.T
    turned = product(right, inverse_root(algebra, product(right.T, right)))
    middle = product(inverse_root(algebra, square) * sizes, turned.T)
    return np.stack([product(each, middle[columns]) for columns, each in own])


def weighted(grams: Floats, weights: Sequence[float]) -> Floats:
    """The Gram matrices of all pairs of weighted matrices."""
    factors = np.array(weights)
    found: Floats = grams * (factors[:, None] * factors)[:, :, None, None]
    return found
