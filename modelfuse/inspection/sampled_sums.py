"""Measurements on a sample of tensors: the sums of ``diff``, estimated for whole tensors.

Samples of many tensors are measured together, as each is small. They are rows of matrices where that is possible: the
dot products of some outputs with each other are a sample of the elements of τⱼ τᵢᵀ, so that interference can be
estimated, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from msgspec import Struct

from modelfuse.dtypes import BF16, computed_in
from modelfuse.inspection.diff_measures import DENSITIES, OUTLYING
from modelfuse.inspection.diff_sums import MOST_SQUARES, GroupSums
from modelfuse.kernels.bfloat16 import from_bfloat16
from modelfuse.kernels.differences import bits_of, decoded, ones_in
from modelfuse.planning.diff_plan import DiffPlan
from modelfuse.planning.diff_sample import SampleBatch, sample_of
from modelfuse.planning.memory_budget import processors
from modelfuse.storage import waiting_while
from modelfuse.storage.local.threads import in_threads

Array = np.ndarray[Any, Any]

#: Bytes for which a further worker is worth its memory, which the system takes long to give.
PER_WORKER = 1 << 25
#: Quantiles of magnitudes between which squares are summed.
PARTS = 100


class Sample(Struct, frozen=True):
    """What was sampled, and how far the numbers may be off.

    Attributes:
        share: The share of the elements that were read.
        bytes_read: The number of bytes.
        model_error: The standard error of ‖τ‖ over all tensors, relative to it: the largest of all models'.
        tensor_error: The same of a single tensor: the median over tensors of which not all was read.
    """

    share: float
    bytes_read: int
    model_error: float
    tensor_error: float


def measure_sample(plan: DiffPlan) -> tuple[GroupSums, Sample]:
    """Estimate the sums of every tensor from a sample.

    Args:
        plan: What is compared.

    Returns:
        The sums of each tensor, in the plan's order, and their error.

    Raises:
        CheckpointError: If an input cannot be read.
    """
    batches = sample_of(plan)
    over, nbytes = False, sum(batch.bytes_read for batch in batches)
    workers = min(plan.recipe.n_process or processors(), nbytes // PER_WORKER + 1)
    with waiting_while(lambda: not over):
        try:
            found = in_threads(_measuring, batches, workers)
        finally:
            over = True
    order = np.argsort([number for batch in batches for number in batch.numbers])
    sums = GroupSums.joined([each for each, _ in found]).rows(order)
    variances = np.concatenate([each for _, each in found])[order]
    return sums, _told(sums, variances, batches)


def _measuring() -> Callable[[SampleBatch], tuple[GroupSums, Array]]:
    scratch = _Scratch({})
    return lambda batch: _measured(batch, scratch)


def _told(sums: GroupSums, variances: Array, batches: Sequence[SampleBatch]) -> Sample:
    """The sample's size, and the errors of norms, which are half of those of squares."""
    squares = np.diagonal(sums.gram, axis1=1, axis2=2)[:, :-1]
    whole = np.sqrt(variances.sum(axis=0)) / np.maximum(squares.sum(axis=0), np.finfo(float).tiny)
    partial = (variances > 0) & (squares > 0)
    deviations = np.sort(np.sqrt(variances[partial]) / squares[partial])
    median = float(deviations[deviations.size // 2]) if deviations.size else 0.0
    share = sum(len(batch.tensors) * batch.runs.elements for batch in batches) / int(sums.elements.sum())
    nbytes = sum(batch.bytes_read for batch in batches)
    return Sample(share, nbytes, float(whole.max(initial=0.0)) / 2, median / 2)


def _measured(batch: SampleBatch, scratch: _Scratch) -> tuple[GroupSums, Array]:
    """The sums of the tensors of a batch, and the variances of ‖τ‖² of all models."""
    first, sizes = batch.tensors[0], np.array([each.measurement.size for each in batch.tensors])
    batch.expect()
    with np.errstate(all="ignore"):
        sample = _SampledElements(batch, scratch)
        sums = sample.estimates(sizes, batch.runs.are_outputs)
    variances = np.zeros((len(sizes), len(first.models)))
    variances[:, [each is not None for each in first.models]] = sample.variances(sizes)
    return sums.spread(first.models), variances


class _Scratch(Struct, frozen=True):
    """Arrays that are used again for every batch, as the system takes long to give memory."""

    held: dict[str, Array]

    def array(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        """An array of a name, without values."""
        size = math.prod(shape)
        found = self.held.get(name)
        if found is None or found.size < size or found.dtype != dtype:
            found = self.held[name] = np.empty(size, dtype)
        return found[:size].reshape(shape)


class _SampledElements:
    """The elements of a batch, in differences of shape (tensors, models + 1, runs, elements); the base is the last.

    Args:
        batch: What to read.
        scratch: Memory.
    """

    def __init__(self, batch: SampleBatch, scratch: _Scratch) -> None:
        measurement = batch.tensors[0].measurement
        self._batch, self._scratch, self._dtypes = batch, scratch, measurement.dtypes
        self._count, self._models = len(batch.tensors), len(measurement.models)
        self._runs, self._length, compute = batch.runs.number, batch.runs.length, str(computed_in(*self._dtypes))
        self._read = []
        for source, dtype in enumerate(self._dtypes):
            raw = scratch.array(f"source {source}", (dtype.nbytes(self._count * batch.runs.elements),), "uint8")
            batch.read(source, raw.data)
            self._read.append(raw)
        shape = self._count, self._models + 1, self._runs, self._length
        self._values = values = scratch.array("values", shape, compute)
        self._decode(len(self._dtypes) - 1, values[:, -1])
        for model, (source, is_delta) in enumerate(measurement.models):
            self._decode(source, values[:, model])
            if not is_delta:
                values[:, model] -= values[:, -1]
        self._bad = np.zeros((self._count, self._models + 1), np.int64)
        self._skipped = np.zeros((self._count, self._models), np.int64)
        self._dots = self._dot_products(values)
        if not np.isfinite(self._dots).all():
            self._leave_out([source for source, _ in measurement.models])
            self._dots = self._dot_products(values.astype(np.float64))

    def _decode(self, source: int, out: Array) -> None:
        """Decode what was read of a source."""
        raw, dtype = self._read[source], self._dtypes[source]
        if dtype is BF16 and out.dtype == np.float32:
            from_bfloat16(raw.view(np.uint16).reshape(out.shape), out)
        else:
            out[:] = decoded(raw, dtype).reshape(out.shape)

    def _dot_products(self, values: Array) -> Array:
        """Of the rows of each run: float64, shape (tensors, runs, models + 1, models + 1).

        Rounding to float32 matters little beside the error of a sample.
        """
        by_run = values.swapaxes(1, 2)
        products: Array = (by_run @ by_run.swapaxes(-1, -2)).astype(np.float64)
        return products

    def _leave_out(self, sources: Sequence[int]) -> None:
        """Count elements that are not finite, and set their differences to zero."""
        values = self._values
        missing = ~np.isfinite(values[:, -1])
        self._bad[:, -1] = np.count_nonzero(missing, axis=(1, 2))
        values[:, -1][missing] = 0
        for model, source in enumerate(sources):
            own, stored = values[:, model], np.empty_like(values[:, model])
            self._decode(source, stored)
            self._bad[:, model] = np.count_nonzero(~np.isfinite(stored), axis=(1, 2))
            out = missing | ~np.isfinite(own)
            self._skipped[:, model] = np.count_nonzero(out, axis=(1, 2))
            own[out] = 0

    def estimates(self, sizes: Array, are_outputs: bool) -> GroupSums:
        """The sums of whole tensors of these sizes, as the samples' suggest them.

        Args:
            sizes: Elements of each tensor.
            are_outputs: Whether runs are outputs of a layer.
        """
        found = GroupSums.zeros(self._count, self._models)
        found.tensors[:], found.elements[:] = 1, self._runs * self._length
        found.gram, found.bad, found.skipped = self._dots.sum(axis=1), self._bad, self._skipped
        differences = self._values[:, :-1]
        magnitudes = self._scratch.array("magnitudes", differences.shape, self._values.dtype.name)
        np.abs(differences, out=magnitudes)
        self._count_elements(found, magnitudes)
        self._order(found, magnitudes)
        scaled = found.scaled(sizes)
        if are_outputs:
            scaled.interference = self._interference(sizes // self._length)
        return scaled

    def _count_elements(self, found: GroupSums, magnitudes: Array) -> None:
        """Count signs, large elements and outliers, as for blocks that are the runs."""
        roots = np.sqrt(np.diagonal(self._dots, axis1=2, axis2=3)[:, :, :-1] / self._length)
        roots = roots.swapaxes(1, 2).astype(self._values.dtype)[..., None]
        differences = self._values[:, :-1]
        mask = self._scratch.array("mask", differences.shape, "bool")
        large = self._packed(np.greater_equal(magnitudes, roots, out=mask))
        changed = self._packed(np.not_equal(differences, 0, out=mask))
        negative = self._packed(np.less(differences, 0, out=mask))
        large &= changed
        for one in range(self._models):
            for other in range(one, self._models):
                opposite = negative[:, one] ^ negative[:, other]
                for number, some in ((0, changed), (2, large)):
                    both = some[:, one] & some[:, other]
                    for place, words in ((number, both), (number + 1, both & opposite)):
                        found.signs[:, place, one, other] = found.signs[:, place, other, one] = ones_in(words)
        largest = magnitudes.max(axis=3)
        found.largest[:] = largest.max(axis=2)
        for tensor, model, run in np.argwhere((largest >= OUTLYING * roots[..., 0]) & (largest > 0)):
            outlying = magnitudes[tensor, model, run] >= OUTLYING * roots[tensor, model, run]
            found.outliers[tensor, model] += np.count_nonzero(outlying)

    def _packed(self, mask: Array) -> Array:
        """Bits in words: shape (tensors, models, words)."""
        words = bits_of(mask.reshape(self._count * self._models, -1))
        return words.reshape(self._count, self._models, -1)

    def _order(self, found: GroupSums, magnitudes: Array) -> None:
        """Which part of ‖τ‖² is in the largest elements: they are sorted, and summed between quantiles."""
        size = self._runs * self._length
        ordered = magnitudes.reshape(self._count, self._models, size)
        ordered.sort(axis=2)
        bounds = np.array(sorted({round(part * size / PARTS) for part in range(PARTS + 1)}))
        np.square(ordered, out=ordered)
        parts = np.add.reduceat(ordered, bounds[:-1], axis=2)[:, :, ::-1]
        elements, squares = size - bounds[::-1], np.zeros((self._count, self._models, bounds.size))
        np.cumsum(parts, axis=2, dtype=np.float64, out=squares[:, :, 1:])
        for number, density in enumerate(DENSITIES):
            found.kept_elements[:, :, number] = np.minimum(density * size, found.changed)
            found.kept_squares[:, :, number] = _interpolated(density * size, elements, squares)
        enough = MOST_SQUARES * squares[:, :, -1]
        place = np.maximum((squares < enough[:, :, None]).sum(axis=2), 1)
        before, after = (np.take_along_axis(squares, each[:, :, None], axis=2)[:, :, 0] for each in (place - 1, place))
        share = (enough - before) / np.where(after > before, after - before, 1)
        found.concentrated[:] = elements[place - 1] + share * (elements[place] - elements[place - 1])

    def _interference(self, outputs: Array) -> Array:
        """Estimates of ‖τⱼ τᵢᵀ‖², their variances, and covariances of that of (i, j) with that of (i, i).

        The squares of dot products of the sampled outputs are scaled to all pairs of outputs: those of an output with
        itself, and others. The variances are the jackknife's over outputs.

        Args:
            outputs: The number of outputs of each matrix.
        """
        runs, models = self._runs, self._models
        rows = self._values[:, :-1].reshape(self._count, models * runs, self._length)
        products = (rows @ rows.swapaxes(1, 2)).astype(np.float64)
        squares = np.square(products).reshape(self._count, models, runs, models, runs)
        itself = np.einsum("tirjr->trij", squares)
        # The pairs of each output with all others.
        others = squares.sum(axis=4).swapaxes(1, 2) + squares.sum(axis=2).transpose(0, 3, 1, 2) - 2 * itself
        n, own, both = outputs[:, None, None].astype(np.float64), itself.sum(axis=1), others.sum(axis=1) / 2

        def scaled(own: Array, pairs: Array, k: int) -> Array:
            found: Array = own * (n / k) + pairs * (n * (n - 1) / (k * (k - 1)))
            return found

        estimates = [scaled(own - itself[:, run], both - others[:, run], runs - 1) for run in range(runs)]
        deviations = np.stack(estimates) - np.mean(estimates, axis=0)
        share = (runs - 1) / runs * (1 - runs / n)
        of_itself = np.einsum("rtii->rti", deviations)[..., None]
        variances = [share * (deviations * each).sum(axis=0) for each in (deviations, of_itself)]
        return np.stack([scaled(own, both, runs), *variances], axis=1)

    def variances(self, sizes: Array) -> Array:
        """The variances of the estimates of ‖τ‖²: shape (tensors, models)."""
        if self._runs < 2:
            return np.zeros((self._count, self._models))
        squares = np.diagonal(self._dots, axis1=2, axis2=3)[:, :, :-1].var(axis=1, ddof=1)
        available = (sizes / self._length)[:, None]
        found: Array = available**2 * squares / self._runs * np.maximum(1 - self._runs / available, 0)
        return found


def _interpolated(place: float, places: Array, values: Array) -> Array:
    """Values along the last axis at a place between others."""
    after = int(np.searchsorted(places, place).clip(1, places.size - 1))
    share = (place - places[after - 1]) / (places[after] - places[after - 1])
    found: Array = values[:, :, after - 1] + share * (values[:, :, after] - values[:, :, after - 1])
    return found
