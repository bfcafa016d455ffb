"""Products and decompositions of float64 matrices: by BLAS and LAPACK, or in a fixed order on any processor."""

from __future__ import annotations

import numpy as np

from modelfuse.kernels.blas_threads import one_thread
from modelfuse.kernels.compiled.ordered_products import add_product
from modelfuse.kernels.jit.compile import compiling
from modelfuse.methods.spec import Algebra, Floats, WholeMatrix

#: Matrices up to this size are factored column by column.
SMALL = 32
#: Columns of a product of a matrix with itself that are computed at a time.
COLUMNS = 256
#: Products of more multiplications wait for the compiler rather than being computed by numpy.
COMPILED = 1 << 22


class Lapack:
    """numpy's, in one thread."""

    def product(self, left: Floats, right: Floats) -> Floats:
        """The matrix product."""
        with one_thread():
            found: Floats = left @ right
        return found

    def eigh(self, matrix: Floats) -> tuple[Floats, Floats]:
        """Eigenvalues and eigenvectors."""
        with one_thread():
            return np.linalg.eigh(matrix)

    def solve(self, matrix: Floats, right: Floats) -> Floats:
        """X of matrix · X = right."""
        with one_thread():
            return np.asarray(np.linalg.solve(matrix, right), np.float64)

    def inverse(self, matrix: Floats) -> Floats:
        """The inverse."""
        with one_thread():
            return np.asarray(np.linalg.inv(matrix), np.float64)


class FixedOrder(Lapack):
    """Products in a fixed order, and linear systems by Cholesky's decomposition made of them: the same bits everywhere.

    Matrices are halved until they are small, so that nearly all is products.
    """

    def product(self, left: Floats, right: Floats) -> Floats:
        """The matrix product; of a matrix with its own transpose, half is computed."""
        rows, columns = left.shape[0], right.shape[1]
        out = np.zeros((rows, columns))
        with compiling(rows * columns * left.shape[1] > COMPILED):
            if not are_transposed(left, right):
                add_product(left, right, out)
                return out
            for first in range(0, columns, COLUMNS):
                last = min(first + COLUMNS, columns)
                add_product(left[:last], right[:, first:last], out[:last, first:last])
                out[first:last, :first] = out[:first, first:last].T
        return out

    def solve(self, matrix: Floats, right: Floats) -> Floats:
        """X of matrix · X = right."""
        root = self._inverse_root(matrix.copy())
        return self.product(root.T, self.product(root, right))

    def inverse(self, matrix: Floats) -> Floats:
        """The inverse."""
        root = self._inverse_root(matrix.copy())
        return self.product(root.T, root)

    def _inverse_root(self, matrix: Floats) -> Floats:
        """L⁻¹, with matrix = L·Lᵀ. Uses up the matrix."""
        size = len(matrix)
        if size <= SMALL:
            return _inverse_root_of_small(matrix)
        half = -(-size // 2)
        found = np.zeros_like(matrix)
        found[:half, :half] = upper = self._inverse_root(matrix[:half, :half])
        below = self.product(matrix[half:, :half], upper.T)
        matrix[half:, half:] -= self.product(below, below.T)
        found[half:, half:] = lower = self._inverse_root(matrix[half:, half:])
        found[half:, :half] = -self.product(lower, self.product(below, upper))
        return found


def _inverse_root_of_small(matrix: Floats) -> Floats:
    """The same, column by column: elementwise operations only."""
    inverse = np.eye(len(matrix))
    for column in range(len(matrix)):
        if not matrix[column, column] > 0:
            raise np.linalg.LinAlgError("Matrix is not positive definite")
        own = matrix[column:, column]
        own /= np.sqrt(own[0])
        matrix[column + 1 :, column + 1 :] -= own[1:, None] * own[1:]
        inverse[column] /= own[0]
        inverse[column + 1 :] -= own[1:, None] * inverse[column]
    return inverse


def are_transposed(left: Floats, right: Floats) -> bool:
    """Whether one is a view of the other, transposed."""
    ones, others = left.__array_interface__, right.__array_interface__
    return left.shape == right.shape[::-1] and left.strides == right.strides[::-1] and ones["data"] == others["data"]


LAPACK, FIXED_ORDER = Lapack(), FixedOrder()


def algebra_of(how: WholeMatrix) -> Algebra:
    """What computes a method on the processor."""
    return FIXED_ORDER if how.fixed_order else LAPACK
