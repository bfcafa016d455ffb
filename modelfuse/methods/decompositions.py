"""What methods of whole matrices share: decompositions of Gram matrices, and whitened directions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modelfuse.methods.spec import Floats

#: Singular values below this share of the largest one are rounding.
NOISE = 1e-6


def directions(gram: Floats, most: int, least: float = 0.0) -> tuple[Floats, Floats]:
    """Of a matrix by its Gram matrix, the right singular vectors, shape (k, number), and values, largest first.

    Args:
        gram: Its Gram matrix.
        most: The most vectors.
        least: Of what is left of a matrix: values below it are rounding, too.
    """
    squares, vectors = np.linalg.eigh(gram)
    sigma = np.sqrt(np.maximum(squares[::-1], 0))
    number = min(most, int(np.count_nonzero(sigma > max(NOISE * sigma[0], least))))
    return vectors[:, ::-1][:, :number], sigma[:number]


def inverse_root(square: Floats) -> Floats:
    """square^(−1/2) of a Gram matrix, zero in directions that it does not have."""
    vectors, sigma = directions(square, len(square))
    half = vectors / np.sqrt(sigma)
    root: Floats = half @ half.T
    return root


def whitened(grams: Floats, left: Sequence[Floats], right: Floats, sizes: Floats) -> Floats:
    """What Ũ·diag(sizes)·Ṽᵀ multiplies each model by; Ũ and Ṽ are the nearest orthonormal ones.

    Args:
        grams: Of all pairs of models' matrices A, shape (models, models, k, k).
        left: One matrix X a model, shape (k, number): U is the sum of all A·X.
        right: V, shape (k, number).
        sizes: One for each of their columns.
    """
    models = range(len(left))
    square = sum(left[i].T @ grams[i, j] @ left[j] for i in models for j in models)
    if not right.shape[1]:
        return np.zeros((len(left), len(right), len(right)))
    middle = inverse_root(np.asarray(square)) * sizes @ (right @ inverse_root(right.T @ right)).T
    return np.stack([own @ middle for own in left])


def weighted(grams: Floats, weights: Sequence[float]) -> Floats:
    """The Gram matrices of all pairs of weighted matrices."""
    factors = np.array(weights)
    found: Floats = grams * (factors[:, None] * factors)[:, :, None, None]
    return found
