"""The merged difference of a matrix, computed from the factors of its parts while rows are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from modelfuse.kernels import PassStep
from modelfuse.kernels.gram_matrices import Windows, ratio, square_of_sum, sum_of_squares
from modelfuse.kernels.matrices import PANEL, MatrixPart
from modelfuse.methods.spec import Algebra, Factors, Floats


class Solved(NamedTuple):
    """A part of a matrix and its factors, transposed if Gram matrices are those of rows."""

    part: MatrixPart
    factors: Factors

    def multiplied(self, algebra: Algebra) -> Solved:
        """The same without a shared factor: those of the models are multiplied by it."""
        each, shared = self.factors
        if shared is None:
            return self
        pairs = ((own, shared) if self.part.of_columns else (shared, own) for own in each)
        return Solved(self.part, Factors(np.stack([algebra.product(*pair) for pair in pairs])))


class Norm(NamedTuple):
    """What the result is scaled by: its norm is to be a share of that of the sum of the differences.

    Attributes:
        share: The share.
        weights: The models' weights.
        squares: Of each part: the squared norm of the sum, as far as rows were read.
    """

    share: float
    weights: Sequence[float]
    squares: list[float]


def multiply(
    windows: Windows, rows: tuple[int, int], solved: Sequence[Solved], block: Floats, algebra: Algebra,
    norm: Norm | None = None,
) -> Iterator[PassStep]:  # fmt: skip
    """Add each part's Σ τᵢ·Kᵢ, without the shared factor, to some rows of the result.

    Args:
        windows: Reads rows.
        rows: The first row and the one after the last.
        solved: The parts.
        block: The rows.
        algebra: What multiplies.
        norm: Where squares of the sum's norm are added up; only if ``rows`` are all.
    """
    top, bottom = rows
    for of_columns in (True, False):
        chosen = [(number, *each) for number, each in enumerate(solved) if each.part.of_columns == of_columns]
        chosen = [each for each in chosen if each[1].locate(top, bottom)[0] < each[1].locate(top, bottom)[1]]
        if not chosen:
            continue
        for window in windows(top, bottom) if of_columns else windows(0, chosen[0][1].height):
            if isinstance(window, PassStep):
                yield window
                continue
            with np.errstate(all="ignore"):
                for number, part, factors in chosen:
                    first, last, values = part.take(window[1], window[0])
                    if norm is not None:
                        norm.squares[number] += square_of_sum(values, norm.weights, part.how.gram)
                    if of_columns:
                        begin = window[0] - top
                        target = block[begin : begin + window[1].shape[1]]
                        into = part.locate(window[0], window[0] + window[1].shape[1])[2]
                        for x, factor in zip(values, factors.each, strict=True):
                            _add(target, into, algebra.product(x, factor))
                        continue
                    for begin, end, into in _panels(part, top, bottom):
                        for x, factor in zip(values, factors.each, strict=True):
                            _add(block, into, algebra.product(factor[begin:end, first:last], x))


def _panels(part: MatrixPart, top: int, bottom: int) -> Iterator[tuple[int, int, Any]]:
    """A part's rows between two of the matrix, some at a time: first and last, and where they are in the block."""
    height = max(1, PANEL // part.columns.size)
    for first in range(top, bottom, height):
        begin, end, (rows, columns) = part.locate(first, min(first + height, bottom))
        if begin < end:
            down = first - top
            rows = slice(rows.start + down, rows.stop + down) if isinstance(rows, slice) else rows + down
            yield begin, end, (rows, columns)


def finish(solved: Sequence[Solved], block: Floats, algebra: Algebra, norm: Norm | None) -> None:
    """Multiply the whole result by the shared factors, and scale it."""
    for number, (part, factors) in enumerate(solved):
        index = _index(part.locate(0, part.height)[2])
        with np.errstate(all="ignore"):
            values = block[index]
            if factors.shared is not None:
                _multiply_in_place(values, factors.shared, part.of_columns, algebra)
            if norm is not None:
                values *= norm.share * ratio(norm.squares[number], sum_of_squares(values))
            if values.base is None:  # A copy, as its rows are no run.
                block[index] = values


def _multiply_in_place(values: Floats, shared: Floats, from_right: bool, algebra: Algebra) -> None:
    size = max(1, PANEL // len(shared))
    for first in range(0, values.shape[not from_right], size):
        if from_right:
            values[first : first + size] = algebra.product(values[first : first + size], shared)
        else:
            values[:, first : first + size] = algebra.product(shared, values[:, first : first + size])


def _add(target: Floats, into: Any, values: Floats) -> None:
    target[_index(into)] += values


def _index(into: Any) -> Any:
    """The index of an array for rows and columns, each a slice or numbers."""
    rows, columns = into
    return into if isinstance(rows, slice) or isinstance(columns, slice) else np.ix_(rows, columns)
