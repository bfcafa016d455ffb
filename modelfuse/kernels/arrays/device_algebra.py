"""Products and decompositions of float64 matrices by torch on a GPU, for methods of whole matrices."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelfuse.errors import ModelfuseError
from modelfuse.kernels.algebra import LAPACK, are_transposed
from modelfuse.kernels.arrays.library import Library, Tensor
from modelfuse.methods.spec import Floats

#: Matrices of the size of the one that is decomposed, in the device's memory: its own, the results and the workspace.
MATRICES = 5


class DeviceAlgebra:
    """Matrices are copied to the device, and results back: that takes little beside the computation.

    Args:
        library: torch's tensors.
        torch: The module.
        most: Bytes of the device's memory to use. Products are computed in parts; decompositions that need more, on the
            processor. None: as much as there is.
    """

    def __init__(self, library: Library, torch: Any, most: int | None) -> None:
        self._library, self._torch, self._most = library, torch, most

    def product(self, left: Floats, right: Floats) -> Floats:
        """The matrix product."""
        rows, columns = left.shape[0], right.shape[1]
        if 0 in (rows, columns, left.shape[1]):
            return np.zeros((rows, columns))
        if self._fits(left.size + right.size + rows * columns):
            made: Floats = self._computed(self._product, left, right)
            return made
        if rows >= columns and rows > 1:
            return np.vstack([self.product(half, right) for half in np.array_split(left, 2)])
        if columns > 1:
            return np.hstack([self.product(left, half) for half in np.array_split(right, 2, axis=1)])
        return LAPACK.product(left, right)

    def eigh(self, matrix: Floats) -> tuple[Floats, Floats]:
        """Eigenvalues and eigenvectors."""
        if not self._fits(MATRICES * matrix.size):
            return LAPACK.eigh(matrix)
        found: tuple[Floats, Floats] = self._computed(self._eigh, matrix)
        return found

    def solve(self, matrix: Floats, right: Floats) -> Floats:
        """X of matrix · X = right."""
        if not self._fits(MATRICES * matrix.size + 2 * right.size):
            return LAPACK.solve(matrix, right)
        found: Floats = self._computed(self._solve, matrix, right)
        return found

    def inverse(self, matrix: Floats) -> Floats:
        """The inverse."""
        return self.solve(matrix, np.eye(len(matrix)))

    def _fits(self, elements: int) -> bool:
        return self._most is None or 8 * elements <= self._most

    def _computed(self, compute: Any, *matrices: Floats) -> Any:
        with self._library.working():
            try:
                return compute(*matrices)
            except RuntimeError as error:
                if "OutOfMemory" not in type(error).__name__:
                    raise
                raise ModelfuseError(
                    f"The memory of the GPU is not enough for matrices of {max(each.shape[0] for each in matrices):,}²",
                    "Use fewer workers (--n_process 1), or --device low_gpu_mem or cpu.",
                ) from error

    def _product(self, left: Floats, right: Floats) -> Floats:
        there = self._library.to_device(right)
        # A view of the host's memory, transposed, is copied once.
        return self._fetched((there.T if are_transposed(left, right) else self._library.to_device(left)) @ there)

    def _eigh(self, matrix: Floats) -> tuple[Floats, Floats]:
        values, vectors = self._torch.linalg.eigh(self._library.to_device(matrix))
        return self._fetched(values), self._fetched(vectors)

    def _solve(self, matrix: Floats, right: Floats) -> Floats:
        root, failed = self._torch.linalg.cholesky_ex(self._library.to_device(matrix))
        if self._library.fetch(failed).any():
            raise np.linalg.LinAlgError("Matrix is not positive definite")
        return self._fetched(self._torch.cholesky_solve(self._library.to_device(right), root))

    def _fetched(self, x: Tensor) -> Floats:
        return np.asarray(self._library.fetch(x), np.float64)
