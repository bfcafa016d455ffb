"""The pass of whole-matrix methods: compute Gram matrices, solve, then write the result.

A tensor is one span, processed by one worker. Elements are read by whole rows and not kept: only Gram matrices, and
matrices derived from them, are in memory. Gram matrices of columns are sums over rows. For those of rows, a panel of
rows is multiplied by itself and all rows after it, and the result is computed panel by panel; a panel is no larger than
a Gram matrix, or small. The result is held if it takes no more memory than solving did, else computed panel by panel.
The shapes of all products depend on the tensor's shape alone, so slices change no bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from modelfuse.errors import ModelfuseError
from modelfuse.kernels import Bytes, Extent, PassStep, Work
from modelfuse.kernels.algebra import algebra_of
from modelfuse.kernels.gram_matrices import (
    BY_MODEL,
    Steps,
    gram_of_columns,
    gram_of_rows,
    ratio,
    ratio_by_gram,
    square_of_sum,
    sum_of_squares,
)
from modelfuse.kernels.matrices import SLICE, MatrixPart, demand_of, panel_of
from modelfuse.kernels.matrix_result import Norm, Solved, finish, multiply
from modelfuse.kernels.matrix_state import MatrixState
from modelfuse.methods.spec import Algebra, Factors, Floats, WholeMatrix


class MatrixPass:
    """The pass that measures, solves and writes a whole tensor.

    Args:
        work: The tensor.
        algebra: What computes; None: numpy or compiled loops, as its method needs. Not pickled: nodes have no other.
    """

    writes = True

    def __init__(self, work: Work, algebra: Algebra | None = None) -> None:
        assert work.matrices is not None
        assert work.method.combination.matrix is not None
        self._work, self._matrices = work, work.matrices
        self._how: WholeMatrix = work.method.combination.matrix
        self._algebra = algebra or algebra_of(self._how)
        self._is_held = demand_of(work.matrices, self._how, work.models).holds(work.matrices)

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
            solved = []
            for part in parts:
                gram = yield from self._gram_of(state, unit, part)
                solved.append(self._solve(gram, part))
                del gram
            if self._is_held:
                yield from self._emit_held(state, begin, solved)
                continue
            share = self._work.method.norm
            unscaled = [each for each in solved if each.part.how.gram in BY_MODEL]
            if share is not None and unscaled:
                yield from self._scale_by_norm(state, begin, unscaled, share)
            yield from self._emit(state, begin, solved)

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
        of_side = gram_of_columns if part.of_columns else gram_of_rows
        windows = partial(self._windows, state, unit * self._matrices.unit)
        return (yield from of_side(windows, part, self._work.models, self._algebra))

    def _solve(self, gram: Floats, part: MatrixPart) -> Solved:
        """The factors that the matrices are multiplied by; NaN if the Gram matrix is not finite."""
        method, kind = self._work.method, part.how.gram
        if not np.isfinite(gram).all():
            k = gram.shape[-1]
            return Solved(part, Factors(np.full((1 if kind == "sum" else self._work.models, k, k), np.nan)))
        try:
            with np.errstate(all="ignore"):
                each, shared = part.how.factors(gram, method.weights, method.shared, part.inputs, self._algebra)
                if method.norm is not None and kind not in BY_MODEL and not self._is_held:
                    each *= method.norm * ratio_by_gram(gram, each, kind, method.weights, self._algebra)
        except np.linalg.LinAlgError as error:
            raise ModelfuseError(
                f"Tensor {self._work.name!r}: {method.merge_type} cannot be computed: {error}",
                "Add a rule that merges it with another method.",
            ) from error
        if not part.of_columns:
            each, shared = each.transpose(0, 2, 1), None if shared is None else shared.T
        solved = Solved(part, Factors(each, shared))
        return solved if self._is_held else solved.multiplied(self._algebra)

    def _scale_by_norm(
        self, state: MatrixState, begin: int, solved: Sequence[Solved], share: float
    ) -> Iterator[PassStep]:
        """Scale each part's result to ``share`` times the norm of the sum of its differences.

        With Gram matrices of single models only, this needs the result itself, which is then computed twice.
        """
        squares, matrices, weights = np.zeros((len(solved), 2)), self._matrices, self._work.method.weights
        for each in self._windows(state, begin, 0, matrices.rows):
            if isinstance(each, PassStep):
                yield each
                continue
            for square, (part, _) in zip(squares, solved, strict=True):
                square[0] += square_of_sum(part.take(each[1], each[0])[2], weights, part.how.gram)
        windows = partial(self._windows, state, begin)
        most = panel_of(max([each.part.k for each in solved if not each.part.of_columns], default=0))
        for start in range(0, matrices.unit, most):
            top, bottom = (-(-edge // matrices.columns) for edge in (start, min(start + most, matrices.unit)))
            block = np.zeros((bottom - top, matrices.columns))
            yield from multiply(windows, (top, bottom), solved, block, self._algebra)
            for square, (part, _) in zip(squares, solved, strict=True):
                made = part.take(block[None], top)[2][0]
                square[1] += sum_of_squares(made) if made.size else 0
        for (_, factors), (whole, made) in zip(solved, squares, strict=True):
            factors.each[:] *= share * ratio(whole, made)

    # The result -------------------------------------------------------------------------------------------------------

    def _emit_held(self, state: MatrixState, begin: int, solved: Sequence[Solved]) -> Iterator[PassStep]:
        """Compute one matrix as a whole, then write it."""
        matrices, share = self._matrices, self._work.method.norm
        norm = None if share is None else Norm(share, self._work.method.weights, [0.0] * len(solved))
        block = np.zeros((matrices.rows, matrices.columns))
        windows = partial(self._windows, state, begin)
        yield from multiply(windows, (0, matrices.rows), solved, block, self._algebra, norm)
        finish(solved, block, self._algebra, norm)
        yield from self._put(state, begin, block.ravel())

    def _emit(self, state: MatrixState, begin: int, solved: Sequence[Solved]) -> Iterator[PassStep]:
        """Compute and write one matrix, panel by panel."""
        matrices, windows = self._matrices, partial(self._windows, state, begin)
        most = panel_of(max([each.part.k for each in solved if not each.part.of_columns], default=0))
        stop = begin + matrices.unit
        for start in range(begin // most * most, stop, most):
            first, last = max(start, begin), min(start + most, stop)
            top, bottom = (first - begin) // matrices.columns, -((begin - last) // matrices.columns)
            block = np.zeros((bottom - top, matrices.columns))
            yield from multiply(windows, (top, bottom), solved, block, self._algebra)
            skipped = first - begin - top * matrices.columns
            yield from self._put(state, first, block.ravel()[skipped : skipped + last - first])

    def _put(self, state: MatrixState, first: int, values: Floats) -> Iterator[PassStep]:
        """Write elements from a number on; a slice that spans several matrices is written once it is full."""
        last = first + values.size
        for slice_ in range(first // SLICE * SLICE, last, SLICE):
            left, right = max(slice_, first), min(slice_ + SLICE, last)
            state.result[left - slice_ : right - slice_] = values[left - first : right - first]
            if right == min(slice_ + SLICE, self._work.size):
                state.writes = True
                yield PassStep(slice_, right - slice_)
