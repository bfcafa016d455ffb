"""The pass that writes a merged difference that is known as a low-rank product, for whole-matrix methods."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from modelfuse.kernels import PassStep
from modelfuse.kernels.blas_threads import one_thread
from modelfuse.kernels.matrices import SLICE
from modelfuse.kernels.matrix_state import MatrixState
from modelfuse.kernels.whole_matrix import MatrixPass


class ProductPass(MatrixPass):
    """Multiplies and writes, slice by slice; slices have a fixed size, so that the memory budget changes no bit."""

    def steps(self, state: MatrixState, first: int, count: int, most: int) -> Iterator[PassStep]:
        """The steps: what is read, in order."""
        assert self._matrices.merged is not None
        left, right = self._matrices.merged.factors()
        size, columns = self._work.size, self._matrices.columns
        state.writes = True
        for start in range(0, size, SLICE):
            stop = min(start + SLICE, size)
            top, bottom = start // columns, -(-stop // columns)
            with one_thread(), np.errstate(all="ignore"):
                rows = left[top:bottom] @ right
            state.result[: stop - start] = rows.ravel()[start - top * columns : stop - top * columns]
            yield PassStep(start, stop - start)
