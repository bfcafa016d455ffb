"""What ``diff`` measures of one tensor: how models' differences to a base look, and how they meet.

A difference is taken as a merge takes it, in the compute type (float32, or float64 where any source is). Elements come
in blocks; what is added up is float64 or counts, in the order of the blocks and, of spans, in theirs, so that neither
workers nor slices change a bit. What models' elements have in common is counted in words of 64 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelfuse.dtypes import BF16, DType, computed_in
from modelfuse.kernels import Bytes, Extent, Procedure, Step
from modelfuse.kernels.bfloat16 import from_bfloat16
from modelfuse.kernels.compiled.bins import count_bins
from modelfuse.kernels.interference import Interference
from modelfuse.kernels.interference import memory_of as interference_memory
from modelfuse.kernels.matrices import Matrices

Array = np.ndarray[Any, Any]

#: Elements of a block, at most; of a matrix, whole rows, at least one.
BLOCK = 1 << 15
#: From how many times the root mean square of its block on an element is outlying.
OUTLYING = 8.0
#: Bins of magnitudes: float32's exponent and five more bits, 32 bins an octave.
BINS, BIN_SHIFT = 8192, 18
#: Rows whose dot products are taken pair by pair.
MOST_APART = 6
#: Bytes of an element of a block in all arrays that are held of one source.
BLOCK_BYTES = 48


@dataclass(frozen=True)
class Measurement:
    """One tensor to measure.

    Attributes:
        name: Its name.
        size: The number of elements.
        dtypes: The types of its sources, the base's last.
        models: For each model that is measured, the number of its source, and whether that is a difference already.
        matrices: How it is cut into matrices, if it is any.
        exact: Whether interference is to be exact.
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
        """The most bytes that measuring it holds beside what is read."""
        models = len(self.models)
        held = 0 if self.matrices is None else interference_memory(self.matrices, models, self.exact)
        return held + (models + 1) * self.block * BLOCK_BYTES


@dataclass
class DifferenceSums:
    """What is added up of a tensor or a part of it.

    Attributes:
        gram: Dot products of all pairs of differences, the base behind them: float64, shape (models + 1, models + 1).
        bad: Elements that are not finite, of each model and the base, int64.
        skipped: Elements of each difference that were left out, as the model's or the base's is not finite.
        largest: The largest magnitude of each difference.
        outliers: Outlying elements of each difference.
        signs: Numbers of elements: those where both differ, those of them with opposite signs, and the same two where
            both are large: int64, shape (4, models, models), of which the upper triangle is used.
        histogram: Elements of each difference by magnitude, int64, shape (models, BINS).
        interference: As of :class:`Interference`.
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
        """Of nothing."""
        one = np.int64
        return cls(
            np.zeros((models + 1, models + 1)), np.zeros(models + 1, one), np.zeros(models, one), np.zeros(models),
            np.zeros(models, one), np.zeros((4, models, models), one), np.zeros((models, BINS), one),
            np.zeros((3, models, models)),
        )  # fmt: skip

    def add(self, other: DifferenceSums) -> None:
        """Add those of what comes next."""
        for name, value in vars(other).items():
            if name == "largest":
                np.maximum(self.largest, value, out=self.largest)
            else:
                vars(self)[name] += value


@dataclass
class DifferenceState:
    """A span under way: sums, and room for a block."""

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
        """As of every span."""
        return self.sums.bad

    def take(self, first: int, raws: Sequence[Bytes], count: int) -> None:
        """Measure a block: its first element, the bytes of each source, and how many elements there are."""
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
        """Count what is not finite, and have it be nothing."""
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
        """Signs, large and outlying elements, and magnitudes."""
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
    """Rows of truth values as rows of bits in 64-bit words, zeros behind them."""
    packed = np.packbits(mask, axis=-1)
    words = np.zeros((len(packed), -(-packed.shape[1] // 8) * 8), np.uint8)
    words[:, : packed.shape[1]] = packed
    return words.view(np.uint64)


def ones_in(words: Array) -> Array:
    """How many bits of each row are set."""
    counts = np.bitwise_count(words) if hasattr(np, "bitwise_count") else _ONES[words.view(np.uint8)]  # numpy 1
    found: Array = counts.sum(axis=1, dtype=np.int64)
    return found


#: The number of bits that are set in each byte.
_ONES = np.array([number.bit_count() for number in range(256)], np.uint8)


class DifferencePass:
    """Measures a tensor, once. A matrix is walked by one worker, by whole rows; anything else in spans."""

    writes = False

    def __init__(self, measurement: Measurement) -> None:
        self._measurement = measurement
        self.span = measurement.size if measurement.matrices is not None else 0

    def start(self) -> DifferenceState:
        return DifferenceState(self._measurement)

    def read_from(self, state: DifferenceState, extents: Sequence[Extent]) -> bool:
        """Elements are given to it."""
        return False

    def steps(self, state: DifferenceState, first: int, count: int, most: int) -> Iterator[Step]:
        """Slices of whole blocks."""
        block = self._measurement.block
        size = max(most // block, 1) * block
        for start in range(first, first + count, size):
            yield Step(start, min(size, first + count - start), False)

    def apply(self, state: DifferenceState, first: int, count: int, raws: Bytes, out: Bytes) -> None:
        del out
        dtypes, block = self._measurement.dtypes, self._measurement.block
        with np.errstate(all="ignore"):
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
    """The values of stored elements, in a type of numpy's."""
    if dtype is BF16:
        return from_bfloat16(raw.view(np.uint16))
    return raw.view(str(dtype.torch))


def measure(measurement: Measurement, take: Callable[[DifferenceSums], None]) -> Procedure:
    """The passes that measure one tensor.

    Args:
        measurement: What to measure.
        take: Called with what was found.
    """
    found: list[DifferenceSums] = yield DifferencePass(measurement)
    whole, *others = found
    for each in others:
        whole.add(each)
    take(whole)
