"""Measurements of ``diff`` on one tensor: statistics of each model's difference to the base, and of pairs of them.

Differences are computed as in a merge, in the compute type (float32, or float64 if any source is float64). Sums are
float64 or counts, added in the order of blocks and spans, so that workers and slices do not change a bit. Elements that
models have in common are counted with bit masks in 64-bit words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelfuse.dtypes import BF16, DType, computed_in
from modelfuse.kernels import Bytes, Extent, PassStep, Procedure
from modelfuse.kernels.bfloat16 import from_bfloat16
from modelfuse.kernels.blas_threads import one_thread
from modelfuse.kernels.compiled.bins import count_bins
from modelfuse.kernels.interference import Interference
from modelfuse.kernels.interference import memory_of as interference_memory
from modelfuse.kernels.matrices import Matrices

Array = np.ndarray[Any, Any]

#: The most elements of a block; a block of a matrix consists of whole rows, at least one.
BLOCK = 1 << 15
#: An element is an outlier from this many times the root mean square of its block on.
OUTLYING = 8.0
#: Bins of magnitudes: the exponent and five mantissa bits of float32, so 32 bins per octave.
BINS, BIN_SHIFT = 8192, 18
#: Rows whose dot products are taken pair by pair.
MOST_APART = 6
#: Bytes per element of a block in all arrays of one source.
BLOCK_BYTES = 48


@dataclass(frozen=True)
class Measurement:
    """One tensor to measure.

    Attributes:
        name: Its name.
        size: The number of elements.
        dtypes: The types of its sources, the base's last.
        models: For each measured model, the index of its source, and whether that is already a difference.
        matrices: How the tensor is split into matrices, if it is.
        exact: Whether interference is computed exactly.
    """

    name: str
    size: int
    dtypes: tuple[DType, ...]
    models: tuple[tuple[int, bool], ...]
    matrices: Matrices | None = None
    exact: bool = False

    @property
    def block(self) -> int:
        """Elements of a block."""
        columns = 0 if self.matrices is None else self.matrices.columns
        return max(BLOCK // columns, 1) * columns if columns else BLOCK

    @property
    def memory(self) -> int:
        """Peak memory in bytes of the measurement, without the input buffers."""
        models = len(self.models)
        held = 0 if self.matrices is None else interference_memory(self.matrices, models, self.exact)
        return held + (models + 1) * self.block * BLOCK_BYTES


@dataclass
class DifferenceSums:
    """Sums over a tensor or a part of it.

    Attributes:
        gram: Dot products of all pairs of differences, then of the base: float64, shape (models + 1, models + 1).
        bad: Counts of non-finite elements of each model, then of the base, int64.
        skipped: Elements of each difference that were skipped because the model's or the base's is not finite.
        largest: The largest magnitude of each difference.
        outliers: Counts of outliers of each difference.
        signs: Numbers of elements: those where both differ, those of them with opposite signs, and the same two where
            both are large: int64, shape (4, models, models), of which the upper triangle is used.
        histogram: Elements of each difference by magnitude, int64, shape (models, BINS).
        interference: See :class:`Interference`.
    """

    gram: Array
    bad: Array
    skipped: Array
    largest: Array
    outliers: Array
    signs: Array
    histogram: Array
    interference: Array

    @classmethod
    def zeros(cls, models: int) -> DifferenceSums:
        """The sums of no elements."""
        one = np.int64
        return cls(
            np.zeros((models + 1, models + 1)), np.zeros(models + 1, one), np.zeros(models, one), np.zeros(models),
            np.zeros(models, one), np.zeros((4, models, models), one), np.zeros((models, BINS), one),
            np.zeros((3, models, models)),
        )  # fmt: skip

    def add(self, other: DifferenceSums) -> None:
        """Add the sums of the elements that follow."""
        for name, value in vars(other).items():
            if name == "largest":
                np.maximum(self.largest, value, out=self.largest)
            else:
                vars(self)[name] += value


@dataclass
class DifferenceState:
    """The state of a span: sums, and buffers for a block."""

    measurement: Measurement
    sums: DifferenceSums = field(init=False)
    interference: Interference | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        measurement, models = self.measurement, len(self.measurement.models)
        self.sums = DifferenceSums.zeros(models)
        if measurement.matrices is not None and models:
            self.interference = Interference(measurement.name, measurement.matrices, models, measurement.exact)
        rows = (models + 1) * min(measurement.block, measurement.size)
        self._compute = str(computed_in(*measurement.dtypes))
        self._values, self._wide = np.empty(rows, self._compute), np.empty(rows)

    @property
    def bad(self) -> Array:
        """See :class:`SpanState`."""
        return self.sums.bad

    def take(self, first: int, raws: Sequence[Bytes], count: int) -> None:
        """Measure the block that starts at element ``first``; ``raws`` has each source's stored bytes."""
        measurement, models = self.measurement, len(self.measurement.models)
        shape = models + 1, count
        values = self._values[: shape[0] * count].reshape(shape)
        values[-1] = decoded(raws[-1], measurement.dtypes[-1])
        for value, (source, is_delta) in zip(values, measurement.models, strict=False):
            own = decoded(raws[source], measurement.dtypes[source])
            if is_delta:
                value[:] = own
            else:
                np.subtract(own, values[-1], out=value)
        wide = self._values[: values.size] if self._compute == "float64" else self._wide[: values.size]
        wide = wide.reshape(shape)
        if self._compute != "float64":
            wide[:] = values
        gram = _dot_products(wide)
        if not np.isfinite(gram).all():
            self._leave_out(values, raws)
            wide[:] = values
            gram = _dot_products(wide)
        self.sums.gram += gram
        if models:
            self._count(values[:-1], np.sqrt(np.diag(gram)[:-1] / count))
        if self.interference is not None:
            self.interference.take(first, values[:-1], wide[:-1])

    def _leave_out(self, values: Array, raws: Sequence[Bytes]) -> None:
        """Count non-finite elements, and set their differences to zero."""
        sums, dtypes = self.sums, self.measurement.dtypes
        missing = ~np.isfinite(values[-1])
        sums.bad[-1] += np.count_nonzero(missing)
        values[-1][missing] = 0
        for number, (value, (source, _)) in enumerate(zip(values, self.measurement.models, strict=False)):
            sums.bad[number] += np.count_nonzero(~np.isfinite(decoded(raws[source], dtypes[source])))
            out = missing | ~np.isfinite(value)
            sums.skipped[number] += np.count_nonzero(out)
            value[out] = 0

    def _count(self, values: Array, sizes: Array) -> None:
        """Count signs, large elements, outliers and magnitudes."""
        sums, magnitudes = self.sums, np.abs(values)
        sizes = sizes.astype(values.dtype)[:, None]
        changed, negative = bits_of(values != 0), bits_of(values < 0)
        large = bits_of(magnitudes >= sizes) & changed
        one, other = np.triu_indices(len(values))
        opposite = negative[one] ^ negative[other]
        for number, some in ((0, changed), (2, large)):
            both = some[one] & some[other]
            sums.signs[number, one, other] += ones_in(both)
            sums.signs[number + 1, one, other] += ones_in(both & opposite)
        largest = magnitudes.max(axis=1)
        np.maximum(sums.largest, largest, out=sums.largest)
        for model in np.flatnonzero((largest >= OUTLYING * sizes[:, 0]) & (largest > 0)):
            sums.outliers[model] += np.count_nonzero(magnitudes[model] >= OUTLYING * sizes[model])
        count_bins(magnitudes.astype(np.float32, copy=False).view(np.int32), BIN_SHIFT, sums.histogram)


def bits_of(mask: Array) -> Array:
    """Pack rows of booleans into 64-bit words, padded with zeros."""
    packed = np.packbits(mask, axis=-1)
    words = np.zeros((len(packed), -(-packed.shape[1] // 8) * 8), np.uint8)
    words[:, : packed.shape[1]] = packed
    return words.view(np.uint64)


def ones_in(words: Array) -> Array:
    """The number of set bits of each row."""
    counts = np.bitwise_count(words) if hasattr(np, "bitwise_count") else _ONES[words.view(np.uint8)]  # numpy 1
    found: Array = counts.sum(axis=1, dtype=np.int64)
    return found


#: The number of set bits of each byte value.
_ONES = np.array([number.bit_count() for number in range(256)], np.uint8)


class DifferencePass:
    """The pass that measures a tensor. A matrix is one span, processed by whole rows; others are cut into spans."""

    writes = False

    def __init__(self, measurement: Measurement) -> None:
        self._measurement = measurement
        self.span = measurement.size if measurement.matrices is not None else 0

    def start(self) -> DifferenceState:
        return DifferenceState(self._measurement)

    def read_from(self, state: DifferenceState, extents: Sequence[Extent]) -> bool:
        """False: the worker reads the elements."""
        return False

    def steps(self, state: DifferenceState, first: int, count: int, most: int) -> Iterator[PassStep]:
        """Slices of whole blocks."""
        block = self._measurement.block
        size = max(most // block, 1) * block
        for start in range(first, first + count, size):
            yield PassStep(start, min(size, first + count - start), False)

    def apply(self, state: DifferenceState, first: int, count: int, raws: Bytes, out: Bytes) -> None:
        del out
        dtypes, block = self._measurement.dtypes, self._measurement.block
        with one_thread(), np.errstate(all="ignore"):
            for begin in range(0, count, block):
                number = min(block, count - begin)
                own = [
                    raw[dtype.nbytes(begin) : dtype.nbytes(begin + number)]
                    for raw, dtype in zip(raws, dtypes, strict=True)
                ]
                state.take(first + begin, own, number)

    def finish(self, state: DifferenceState) -> DifferenceSums:
        if state.interference is not None:
            state.sums.interference += state.interference.sums
        return state.sums


def _dot_products(rows: Array) -> Array:
    """The dot products of all pairs of rows; of few, each by itself is faster than a product of such matrices."""
    if len(rows) > MOST_APART:
        together: Array = rows @ rows.T
        return together
    found = np.empty((len(rows), len(rows)))
    for one, row in enumerate(rows):
        for other in range(one, len(rows)):
            found[one, other] = found[other, one] = row @ rows[other]
    return found


def decoded(raw: Bytes, dtype: DType) -> Array:
    """Decode stored elements to a numpy type."""
    if dtype is BF16:
        return from_bfloat16(raw.view(np.uint16))
    return raw.view(str(dtype.torch))


def measure(measurement: Measurement, take: Callable[[DifferenceSums], None]) -> Procedure:
    """The procedure that measures one tensor.

    Args:
        measurement: What to measure.
        take: Called with the sums.
    """
    found: list[DifferenceSums] = yield DifferencePass(measurement)
    whole, *others = found
    for each in others:
        whole.add(each)
    take(whole)
