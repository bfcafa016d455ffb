"""Truncated singular value decomposition, bit-identical on all processors.

Subspace iteration from random vectors (Halko, Martinsson and Tropp 2011, arXiv 0909.4061), then one-sided Jacobi
rotations. All sums are in float64 in a fixed order; LAPACK does not guarantee the same bits on all processors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from modelfuse.kernels.arrays import plain
from modelfuse.kernels.jit.compile import compile_kernel
from modelfuse.methods.random import draws

Array = np.ndarray[Any, np.dtype[Any]]

#: Oversampling (vectors beyond the requested rank), and the number of subspace iterations.
EXTRA, ROUNDS = 8, 4
#: Jacobi rotations stop when no two vectors have a larger cosine, or after this many sweeps.
COSINE, SWEEPS = 1e-12, 30


def factorize(matrix: Array, rank: int, key: int) -> tuple[Array, Array]:
    """The best approximation of a matrix by a product of the given rank (at most the smaller dimension).

    Args:
        matrix: float32 or float64, shape (rows, columns), contiguous.
        rank: The rank.
        key: The key of the random stream of the initial vectors.

    Returns:
        float64 factors of shape (rows, rank) and (rank, columns), each scaled by the square roots of the singular
        values.
    """
    rows, columns = matrix.shape
    rank = min(rank, rows, columns)
    count = min(rank + EXTRA, rows, columns)
    right = draws(key, 0, count * columns).astype(np.float64).reshape(count, columns) - 0.5
    left = np.empty((count, rows))
    for _ in range(ROUNDS + 1):
        project(matrix, right, left)
        orthonormalize(left)
        project_back(matrix, left, right)
        if _ < ROUNDS:
            orthonormalize(right)
    rotate(right, left)
    sizes = np.sqrt(np.array([_sequential_sum(row * row) for row in right]))
    order = np.argsort(-sizes, kind="stable")[:rank]
    halves = np.sqrt(sizes[order])[:, None]
    with np.errstate(all="ignore"):
        shares = np.where(halves > 0, right[order] / halves, 0.0)
    return np.ascontiguousarray((left[order] * halves).T), shares


def _sequential_sum(values: Array) -> float:
    return float(np.cumsum(values)[-1])


@compile_kernel(plain=plain.project)
def project(matrix: Array, right: Array, left: Array) -> None:
    """left[c] = matrix · right[c] for every vector: a row at a time, each sum in the order of the columns."""
    count = len(right)
    sums = np.empty(count)
    turned = right.T.copy()
    for i in range(matrix.shape[0]):
        sums[:] = 0
        for j in range(matrix.shape[1]):
            value, vector = np.float64(matrix[i, j]), turned[j]
            if value != 0:
                for c in range(count):
                    sums[c] += value * vector[c]
        for c in range(count):
            left[c, i] = sums[c]


@compile_kernel(plain=plain.project_back)
def project_back(matrix: Array, left: Array, right: Array) -> None:
    """right[c] = left[c] · matrix for every vector, each sum in the order of the rows."""
    count = len(left)
    sums = np.zeros((matrix.shape[1], count))
    turned = left.T.copy()
    for i in range(matrix.shape[0]):
        vector = turned[i]
        for j in range(matrix.shape[1]):
            value, total = np.float64(matrix[i, j]), sums[j]
            if value != 0:
                for c in range(count):
                    total[c] += value * vector[c]
    for c in range(count):
        for j in range(matrix.shape[1]):
            right[c, j] = sums[j, c]


@compile_kernel
def _dot(one: Array, other: Array) -> float:
    total = 0.0
    for i in range(one.size):
        total += one[i] * other[i]
    return total


@compile_kernel(plain=plain.orthonormalize)
def orthonormalize(vectors: Array) -> None:
    """Gram-Schmidt, each vector twice; linearly dependent vectors become zero."""
    for c in range(len(vectors)):
        before = np.sqrt(_dot(vectors[c], vectors[c]))
        for _ in range(2):
            for b in range(c):
                share = _dot(vectors[b], vectors[c])
                for i in range(vectors.shape[1]):
                    vectors[c, i] -= share * vectors[b, i]
        after = np.sqrt(_dot(vectors[c], vectors[c]))
        scale = 1 / after if after > 1e-13 * before else 0.0
        for i in range(vectors.shape[1]):
            vectors[c, i] *= scale


@compile_kernel(plain=plain.rotate)
def rotate(vectors: Array, beside: Array) -> None:
    """One-sided Jacobi rotations until the vectors are orthogonal; the same rotations are applied to ``beside``."""
    for _ in range(SWEEPS):
        largest = 0.0
        for a in range(len(vectors) - 1):
            for b in range(a + 1, len(vectors)):
                one, other = _dot(vectors[a], vectors[a]), _dot(vectors[b], vectors[b])
                both = _dot(vectors[a], vectors[b])
                if both == 0 or abs(both) <= COSINE * np.sqrt(one * other):
                    continue
                largest = max(largest, abs(both) / np.sqrt(one * other))
                tilt = (other - one) / (2 * both)
                tangent = (1.0 if tilt >= 0 else -1.0) / (abs(tilt) + np.sqrt(1 + tilt * tilt))
                cosine = 1 / np.sqrt(1 + tangent * tangent)
                _turn(vectors, a, b, cosine, cosine * tangent)
                _turn(beside, a, b, cosine, cosine * tangent)
        if largest == 0:
            break


@compile_kernel
def _turn(vectors: Array, a: int, b: int, cosine: float, sine: float) -> None:
    for i in range(vectors.shape[1]):
        one, other = vectors[a, i], vectors[b, i]
        vectors[a, i] = cosine * one - sine * other
        vectors[b, i] = sine * one + cosine * other
