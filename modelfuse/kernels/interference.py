"""Interference of models, ‖τⱼ τᵢᵀ‖² (how strongly one model's difference acts on the inputs that another's uses).

It is estimated in one pass. For a matrix τ of n outputs, a sketch S = C·τ is kept, where C sums the outputs into k
buckets with random signs (a count sketch); it is accumulated row by row, so no matrix is held whole. Let M = τⱼ τᵢᵀ
and Y = Sⱼ Sᵢᵀ = C M Cᵀ. For two buckets p ≠ q, the mean of Y²pq over the signs is the sum of M²ab over the outputs a in
p and b in q. So the sum of Y² off the diagonal, scaled to all pairs of outputs, estimates that of M² off the diagonal;
the diagonal of M consists of dot products of each output with itself, which are summed exactly. The error is estimated
by the jackknife over buckets, times the share 1 − k/n of outputs without a bucket of their own. With as many buckets as
outputs everything is exact.

Output a goes to bucket a mod k; k is prime, so that buckets do not line up with attention heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from modelfuse.kernels.matrices import Matrices, run_of
from modelfuse.methods.random import draws, stream_key

Array = np.ndarray[Any, Any]

#: Buckets of a sketch.
PROBES = 127
#: Rows per matrix product.
PANEL = 1024


class Buckets:
    """The assignment of one layer's outputs to buckets.

    Attributes:
        outputs: The indices of the tensor's outputs that belong to the layer, ascending.
        k: The number of buckets.
        offset: The index of the first bucket among those of all layers of the tensor.
        signs: The sign of each output, float32; None if each has its own bucket.
    """

    def __init__(self, name: str, number: int, outputs: Array, offset: int, exact: bool) -> None:
        self.outputs, self.offset = outputs, offset
        self.k = outputs.size if exact else min(outputs.size, PROBES)
        self.signs: Array | None = None
        if self.k < outputs.size:
            half = np.float32(0.5)
            self.signs = np.where(draws(stream_key(0, number, name), 0, outputs.size) < half, half + half, -half - half)

    @property
    def scale(self) -> float:
        """The number of ordered pairs of different outputs, divided by those in different buckets."""
        n = self.outputs.size
        sizes = np.bincount(np.arange(n) % self.k, minlength=self.k)
        return float(n * (n - 1) / (n * n - (sizes * sizes).sum()))


class Interference:
    """Accumulates products of all pairs of models' matrices, row by row.

    Args:
        name: The tensor's name; the random signs depend on it.
        matrices: How the tensor is split into matrices.
        models: The number of models.
        exact: Whether each output has its own bucket.

    Attributes:
        sums: float64, shape (3, models, models): the sums over all matrices of ‖τⱼ τᵢᵀ‖²; of the variances of these as
            estimates; and of the covariances of that of (i, j) with that of (i, i).
    """

    def __init__(self, name: str, matrices: Matrices, models: int, exact: bool) -> None:
        self._matrices, self._models = matrices, models
        self._buckets = buckets_of(name, matrices, exact)
        total = sum(each.k for each in self._buckets)
        self._sketch = np.zeros((models, total, matrices.inputs), np.float32)
        self._sketched = any(each.signs is not None for each in self._buckets)
        width = matrices.columns if self._sketched and not matrices.out_first else 0
        #: If outputs are columns: the dot products of all columns. If they are rows: sums of squares of dot products.
        self._dots = np.zeros((models, models, width))
        self._squares = np.zeros((len(self._buckets), models, models))
        self.sums = np.zeros((3, models, models))

    def take(self, first: int, values: Array, wide: Array) -> None:
        """Add whole rows.

        Args:
            first: The index in the tensor of the first row's first element.
            values: Differences, shape (models, elements).
            wide: The same as float64.
        """
        columns = self._matrices.columns
        begin, number = first // columns, values.shape[1] // columns
        shape, done = (self._models, number, columns), 0
        values, wide = values.reshape(shape), wide.reshape(shape)
        while done < number:
            row = (begin + done) % self._matrices.rows
            count = min(number - done, self._matrices.rows - row)
            add = self._add_rows if self._matrices.out_first else self._add_columns
            add(row, values[:, done : done + count], wide[:, done : done + count])
            done += count
            if row + count == self._matrices.rows:
                self._end()

    def _add_rows(self, row: int, values: Array, wide: Array) -> None:
        """Rows are outputs: add each to its bucket."""
        for number, each in enumerate(self._buckets):
            begin, end = (int(position) for position in np.searchsorted(each.outputs, [row, row + values.shape[1]]))
            if begin == end:
                continue
            chosen = run_of(each.outputs[begin:end] - row)
            own = values[:, chosen]
            if each.signs is not None:
                own = own * each.signs[None, begin:end, None]
                self._squares[number] += _squares_of_dots(wide[:, chosen])
            position = begin
            while position < end:
                bucket = position % each.k
                count = min(end - position, each.k - bucket)
                target = each.offset + bucket
                self._sketch[:, target : target + count] += own[:, position - begin : position - begin + count]
                position += count

    def _add_columns(self, row: int, values: Array, wide: Array) -> None:
        """Columns are outputs: for each row (an input), add the columns to their buckets."""
        models, count, _ = values.shape
        for each in self._buckets:
            own = values[:, :, run_of(each.outputs)]
            if each.signs is not None:
                folds = -(-each.outputs.size // each.k)
                padded = np.zeros((models, count, folds * each.k), values.dtype)
                np.multiply(own, each.signs, out=padded[:, :, : each.outputs.size])
                own = padded.reshape(models, count, folds, each.k).sum(axis=2)
            target = self._sketch[:, each.offset : each.offset + each.k, row : row + count]
            target[:] = own.transpose(0, 2, 1)
        if self._sketched:
            for i in range(models):
                for j in range(i, models):
                    self._dots[i, j] += np.einsum("rc,rc->c", wide[i], wide[j])

    def _end(self) -> None:
        """A matrix is complete: add its estimates, and reset the sketch."""
        for number, each in enumerate(self._buckets):
            sketch = self._sketch[:, each.offset : each.offset + each.k]
            diagonal = self._squares[number]
            if each.signs is not None and not self._matrices.out_first:
                dots = self._dots[:, :, each.outputs]
                diagonal = (dots * dots).sum(axis=2)
            if each.signs is None:
                self._add_exact(sketch)
            else:
                self._add_estimate(each, sketch, diagonal)
        self._sketch[:] = 0
        self._dots[:], self._squares[:] = 0, 0

    def _add_exact(self, matrices: Array) -> None:
        """Add the squares of the products of whole matrices, or the dot products of their Gram matrices: the same."""
        _, outputs, inputs = matrices.shape
        by_inputs = 2 * inputs < (self._models + 1) * outputs
        panels = _grams(matrices) if by_inputs else _products(matrices)
        for i, j, square in panels:
            self.sums[0, i, j] += square
            if i != j:
                self.sums[0, j, i] += square

    def _add_estimate(self, buckets: Buckets, sketch: Array, diagonal: Array) -> None:
        k, n, scale = buckets.k, buckets.outputs.size, buckets.scale
        deviations = np.empty((self._models, self._models, k))
        for i in range(self._models):
            for j in range(i, self._models):
                # Last bits of float32 are far below the sketch's error.
                squares = (sketch[j] @ sketch[i].T).astype(np.float64) ** 2
                np.fill_diagonal(squares, 0.0)
                total, by_bucket = squares.sum(), squares.sum(axis=0) + squares.sum(axis=1)
                deviations[i, j] = deviations[j, i] = scale * k / (k - 2) * (2 * total / k - by_bucket)
                own = diagonal[i, j] + scale * total
                self.sums[0, i, j] += own
                if i != j:
                    self.sums[0, j, i] += own
        share = (k - 1) / k * (1 - k / n)
        self.sums[1] += share * (deviations * deviations).sum(axis=2)
        itself = deviations[np.arange(self._models), np.arange(self._models)]
        self.sums[2] += share * (deviations * itself[:, None]).sum(axis=2)


def _products(matrices: Array) -> Iterator[tuple[int, int, float]]:
    """The sums of squares of τⱼ τᵢᵀ, pair by pair, in parts."""
    models, outputs, _ = matrices.shape
    for i in range(models):
        for j in range(i, models):
            for top in range(0, outputs, PANEL):
                one = matrices[j, top : top + PANEL].astype(np.float64)
                for left in range(0, outputs, PANEL):
                    product = one @ matrices[i, left : left + PANEL].astype(np.float64).T
                    yield i, j, float(np.vdot(product, product))


def _grams(matrices: Array) -> Iterator[tuple[int, int, float]]:
    """The same as the dot products of τᵢᵀτᵢ and τⱼᵀτⱼ, some columns at a time: less work where inputs are few."""
    models, outputs, inputs = matrices.shape
    for left in range(0, inputs, PANEL):
        grams = np.zeros((models, inputs, min(PANEL, inputs - left)))
        for gram, own in zip(grams, matrices, strict=True):
            for top in range(0, outputs, PANEL):
                rows = own[top : top + PANEL].astype(np.float64)
                gram += rows.T @ rows[:, left : left + PANEL]
        for i in range(models):
            for j in range(i, models):
                yield i, j, float(np.vdot(grams[i], grams[j]))


def _squares_of_dots(rows: Array) -> Array:
    """The sums over rows of the squares of all pairs of models' dot products.

    Args:
        rows: float64, shape (models, rows, columns).
    """
    found = np.empty((len(rows), len(rows)))
    for i, own in enumerate(rows):
        for j in range(i, len(rows)):
            # The first is as fast as BLAS; numpy 1 lacks it.
            dots = np.vecdot(own, rows[j]) if hasattr(np, "vecdot") else np.einsum("rc,rc->r", own, rows[j])
            found[i, j] = found[j, i] = dots @ dots
    return found


def buckets_of(name: str, matrices: Matrices, exact: bool) -> list[Buckets]:
    """The buckets of each layer of a tensor."""
    found, offset = list[Buckets](), 0
    for number, outputs in enumerate(matrices.outputs):
        found.append(Buckets(name, number, outputs, offset, exact))
        offset += found[-1].k
    return found


def memory_of(matrices: Matrices, models: int, exact: bool) -> int:
    """Peak memory of :class:`Interference` in bytes."""
    sizes = [each.size if exact else min(each.size, PROBES) for each in matrices.outputs]
    dots = 0 if matrices.out_first or exact else models * models * matrices.columns * 8
    wide = (models + 2) * PANEL * matrices.inputs * 8
    return models * sum(sizes) * matrices.inputs * 4 + wide + dots
