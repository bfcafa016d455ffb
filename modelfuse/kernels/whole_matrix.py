"""The pass of whole-matrix methods: compute Gram matrices, solve, then write the result.

A tensor is one span, processed by one worker. Elements are read by whole rows and not kept: only Gram matrices, and
matrices derived from them, are in memory. Gram matrices of columns are sums over rows. For those of rows, a panel of
rows is multiplied by itself and all rows after it, and the result is computed panel by panel; a panel is no larger than
a Gram matrix, or small. The shapes of all products depend on the tensor's shape alone, so slices change no bit.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np

from modelfuse.errors import ModelfuseError
from modelfuse.kernels import Bytes, Extent, PassStep, Work
from modelfuse.kernels.blas_threads import one_thread
from modelfuse.kernels.gram_matrices import BY_MODEL, allocate_grams, even_weights, ratio, ratio_by_gram
from modelfuse.kernels.matrices import PANEL, SLICE, MatrixPart, panel_of
from modelfuse.kernels.matrix_state import MatrixState
from modelfuse.methods.spec import Floats, WholeMatrix

#: A generator of steps that returns a float64 array.
Steps = Generator[PassStep, None, Floats]


class MatrixPass:
    """The pass that measures, solves and writes a whole tensor."""

    writes = True

    def __init__(self, work: Work) -> None:
        assert work.matrices is not None
        assert work.method.combination.matrix is not None
        self._work, self._matrices = work, work.matrices
        self._how: WholeMatrix = work.method.combination.matrix

    def __reduce__(self) -> tuple[type[MatrixPass], tuple[Work]]:
        return type(self), (self._work,)  # Declarations cannot be pickled, only methods by their names.

    @property
    def span(self) -> int:
        """The whole tensor."""
        return self._work.size

    def start(self) -> MatrixState:
        result = np.empty(min(SLICE, self._work.size))
        return MatrixState(np.zeros(len(self._work.sources) + 1, np.int64), result)

    def read_from(self, state: MatrixState, extents: Sequence[Extent]) -> bool:
        """False: the worker reads the rows."""
        return False

    def finish(self, state: MatrixState) -> None:
        return None

    def apply(self, state: MatrixState, first: int, count: int, raws: Bytes, out: Bytes) -> None:
        with np.errstate(all="ignore"):
            if state.writes:
                self._write(state, count, raws, out)
            else:
                state.values = self._differences(state, count, raws)

    def steps(self, state: MatrixState, first: int, count: int, most: int) -> Iterator[PassStep]:
        """The steps: what is read, in order; computations happen between the steps."""
        for unit in range(self._matrices.units):
            begin = unit * self._matrices.unit
            numbers, models = range(len(self._matrices.outputs)), self._work.models
            parts = [MatrixPart(self._matrices, each, self._how, models) for each in numbers]
            factors = []
            for part in parts:
                gram = yield from self._gram_of(state, unit, part)
                factors.append(self._solve(gram, part))
                del gram
            share = self._work.method.norm
            unscaled = [each for each in zip(parts, factors, strict=True) if each[0].how.gram in BY_MODEL]
            if share is not None and unscaled:
                some, own = [part for part, _ in unscaled], [each for _, each in unscaled]
                yield from self._scale_by_norm(state, begin, some, own, share)
            yield from self._emit(state, begin, parts, factors)

    # Elements ---------------------------------------------------------------------------------------------------------

    def _decode(self, state: MatrixState, raws: Bytes, source: int, count: int) -> Floats:
        dtype = self._work.sources[source]
        return state.decode(raws[source, : dtype.nbytes(count)], dtype)

    def _differences(self, state: MatrixState, count: int, raws: Bytes) -> Floats:
        """Each model's difference to the base, or the weighted sum of these: shape (matrices, elements)."""
        work, summed = self._work, self._how.gram == "sum"
        base = self._decode(state, raws, work.models, count) if work.has_base else None
        found = np.zeros((1 if summed else work.models, count))
        for model, is_delta in enumerate(work.deltas or (False,) * work.models):
            own = self._decode(state, raws, model, count)
            if base is not None and not is_delta:
                own = own - base
            if summed:
                found[0] += own * work.method.weights[model]
            else:
                found[model] = own
        return found

    def _write(self, state: MatrixState, count: int, raws: Bytes, out: Bytes) -> None:
        work, arithmetic = self._work, state.arithmetic
        for source in range(len(work.sources)):
            values = self._decode(state, raws, source, count)
            state.bad[source] += count - np.count_nonzero(np.isfinite(values))
        result = state.result[:count] * work.method.factor
        if work.has_base:
            result += values  # The last source's.
        stored = arithmetic.encode(result, work.out)
        state.bad[-1] += arithmetic.count_bad(stored)
        state.library.store(stored, out[: work.out.nbytes(count)])

    def _windows(
        self, state: MatrixState, begin: int, first: int, stop: int
    ) -> Iterator[PassStep | tuple[int, Floats]]:
        """Steps over rows of the matrix that starts at element ``begin``; after each, its first row and values."""
        columns = self._matrices.columns
        fits = (stop - first) * columns <= self._matrices.window
        rows = stop - first if fits else max(1, SLICE // columns)
        for start in range(first, stop, rows):
            count = min(rows, stop - start)
            state.writes = False
            yield PassStep(begin + start * columns, count * columns, False)
            yield start, state.values.reshape(-1, count, columns)
            state.values = np.empty((0, 0))

    # Gram matrices ----------------------------------------------------------------------------------------------------

    def _gram_of(self, state: MatrixState, unit: int, part: MatrixPart) -> Steps:
        """The Gram matrices of a part of one matrix."""
        if part.how.gram == "given":
            return state.read_grams(self._matrices.grams, unit, part.k)
        of_side = self._of_columns if part.of_columns else self._of_rows
        return (yield from of_side(state, unit * self._matrices.unit, part))

    def _of_columns(self, state: MatrixState, begin: int, part: MatrixPart) -> Steps:
        """Gram matrices of the columns: sums of products of hundreds or thousands of rows."""
        stacked, grams = allocate_grams(part, self._work.models)
        height = max(1, SLICE // self._matrices.columns, part.k // 2)
        panel, filled = np.empty((1 + max(i for i, _ in grams), height, part.k)), 0

        def add() -> None:
            with one_thread(), np.errstate(all="ignore"):
                for (i, j), gram in grams.items():
                    if i <= j:
                        gram += panel[i, :filled].T @ panel[j, :filled]

        for each in self._windows(state, begin, int(part.rows[0]), int(part.rows[-1]) + 1):
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

    def _of_rows(self, state: MatrixState, begin: int, part: MatrixPart) -> Steps:
        """Gram matrices of the rows: a panel of rows is multiplied by itself and by all rows after it."""
        stacked, grams = allocate_grams(part, self._work.models)
        number, width = 1 + max(i for i, _ in grams), part.columns.size
        height = min(max(1, max(part.k**2, PANEL) // (number * width)), part.k)
        panel = np.empty((number, height, width))
        for top in range(0, part.k, height):
            bottom = min(top + height, part.k)
            for each in self._windows(state, begin, int(part.rows[top]), int(part.rows[-1]) + 1):
                if isinstance(each, PassStep):
                    yield each
                    continue
                first, last, values = part.take(each[1], each[0])
                known = min(last, bottom)
                for own, rows in zip(values, panel, strict=True):
                    rows[first - top : known - top] = own[: max(known - first, 0)]
                with one_thread(), np.errstate(all="ignore"):
                    for (i, j), gram in grams.items():
                        gram[top:known, first:last] = panel[i, : known - top] @ values[j].T
        for row in range(part.k):
            for (i, j), gram in grams.items():
                gram[row + 1 :, row] = grams[j, i][row, row + 1 :]
        return stacked

    def _solve(self, gram: Floats, part: MatrixPart) -> Floats:
        """The factors that the matrices are multiplied by; NaN if the Gram matrix is not finite."""
        method = self._work.method
        if not np.isfinite(gram).all():
            k = gram.shape[-1]
            return np.full((1 if part.how.gram == "sum" else self._work.models, k, k), np.nan)
        try:
            with one_thread(), np.errstate(all="ignore"):
                factors = part.how.factors(gram, method.weights, method.shared, part.inputs)
                if method.norm is not None and part.how.gram not in BY_MODEL:
                    factors *= method.norm * ratio_by_gram(gram, factors, part.how.gram, method.weights)
        except np.linalg.LinAlgError as error:
            raise ModelfuseError(
                f"Tensor {self._work.name!r}: {method.merge_type} cannot be computed: {error}",
                "Add a rule that merges it with another method.",
            ) from error
        return factors if part.of_columns else factors.transpose(0, 2, 1)

    def _scale_by_norm(
        self, state: MatrixState, begin: int, parts: Sequence[MatrixPart], factors: Sequence[Floats], share: float
    ) -> Iterator[PassStep]:
        """Scale each part's result to ``share`` times the norm of the sum of its differences.

        With Gram matrices of single models only, this needs the result itself, which is then computed twice.
        """
        squares, matrices, weights = np.zeros((len(parts), 2)), self._matrices, even_weights(self._work.method.weights)
        for each in self._windows(state, begin, 0, matrices.rows):
            if isinstance(each, PassStep):
                yield each
                continue
            for square, part in zip(squares, parts, strict=True):
                whole = np.tensordot(weights, part.take(each[1], each[0])[2], 1)
                square[0] += np.vdot(whole, whole)
        most = panel_of(max([part.k for part in parts if not part.of_columns], default=0))
        for start in range(0, matrices.unit, most):
            top, bottom = (-(-edge // matrices.columns) for edge in (start, min(start + most, matrices.unit)))
            block = np.zeros((bottom - top, matrices.columns))
            yield from self._multiply(state, begin, top, bottom, parts, factors, block)
            for square, part in zip(squares, parts, strict=True):
                made = part.take(block[None], top)[2][0]
                square[1] += np.vdot(made, made)
        for own, (whole, made) in zip(factors, squares, strict=True):
            own *= share * ratio(whole, made)

    # The result -------------------------------------------------------------------------------------------------------

    def _emit(
        self, state: MatrixState, begin: int, parts: Sequence[MatrixPart], factors: Sequence[Floats]
    ) -> Iterator[PassStep]:
        """Compute and write one matrix; a slice that spans several matrices is written once it is full."""
        matrices, size = self._matrices, self._work.size
        most = panel_of(max([part.k for part in parts if not part.of_columns], default=0))
        stop = begin + matrices.unit
        for start in range(begin // most * most, stop, most):
            first, last = max(start, begin), min(start + most, stop)
            top, bottom = (first - begin) // matrices.columns, -((begin - last) // matrices.columns)
            block = np.zeros((bottom - top, matrices.columns))
            yield from self._multiply(state, begin, top, bottom, parts, factors, block)
            values = block.ravel()[first - begin - top * matrices.columns :]
            for slice_ in range(first // SLICE * SLICE, last, SLICE):
                left, right = max(slice_, first), min(slice_ + SLICE, last)
                state.result[left - slice_ : right - slice_] = values[left - first : right - first]
                if right == min(slice_ + SLICE, size):
                    state.writes = True
                    yield PassStep(slice_, right - slice_)

    def _multiply(
        self, state: MatrixState, begin: int, top: int, bottom: int, parts: Sequence[MatrixPart],
        factors: Sequence[Floats], block: Floats,
    ) -> Iterator[PassStep]:  # fmt: skip
        """Add the parts' results to the rows from ``top`` to ``bottom``."""
        for of_columns in (True, False):
            chosen = [(part, own) for part, own in zip(parts, factors, strict=True) if part.of_columns == of_columns]
            chosen = [(part, own) for part, own in chosen if part.locate(top, bottom)[0] < part.locate(top, bottom)[1]]
            if not chosen:
                continue
            rows = (top, bottom) if of_columns else (0, self._matrices.rows)
            for each in self._windows(state, begin, *rows):
                if isinstance(each, PassStep):
                    yield each
                    continue
                with one_thread(), np.errstate(all="ignore"):
                    for part, own in chosen:
                        first, last, values = part.take(each[1], each[0])
                        if of_columns:
                            _, _, indices = part.locate(each[0], each[0] + each[1].shape[1])
                            target = block[each[0] - top : each[0] - top + each[1].shape[1]]
                            products = [x @ factor for x, factor in zip(values, own, strict=True)]
                        else:
                            begins, ends, indices = part.locate(top, bottom)
                            target = block
                            products = [
                                factor[begins:ends, first:last] @ x for x, factor in zip(values, own, strict=True)
                            ]
                        rows_, columns = indices
                        for product in products:
                            _add(target, rows_, columns, product)


def _add(target: Floats, rows: Any, columns: Any, values: Floats) -> None:
    if isinstance(rows, slice) or isinstance(columns, slice):
        target[rows, columns] += values
    else:
        target[np.ix_(rows, columns)] += values
