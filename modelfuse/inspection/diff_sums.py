"""Sum the measurements of tensors over layers, modules and models, and compute the reported measures from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from modelfuse.inspection.diff_measures import DENSITIES, Change, Kept, ModelPair, TensorGroup
from modelfuse.kernels.differences import BIN_SHIFT, DifferenceSums

Array = np.ndarray[Any, Any]

#: Interference is reported up to this relative standard error; in a sample, that of single tensors exceeds it.
MOST_ERROR = 0.25
#: ``density_90`` is the smallest share of the elements that holds this share of ‖τ‖².
MOST_SQUARES = 0.9


class GroupKey(NamedTuple):
    """What a group is called, and where in a model it is; see :class:`TensorGroup`."""

    name: str
    stack: str
    layer: int | None
    module: str | None


@dataclass
class GroupSums:
    """Sums over groups of tensors. Every array has one row per group.

    Attributes:
        tensors: The number of tensors: int64, shape (groups,).
        elements: The number of elements: int64, shape (groups,).
        gram: As of :class:`DifferenceSums`, and so are the next six; ``signs`` is symmetric here.
        kept_elements: Elements that trim leaves different from the base: shape (groups, models, densities).
        kept_squares: The part of ‖τ‖² that trim keeps, of the same shape.
        concentrated: The fewest elements of each tensor that hold MOST_SQUARES of its ‖τ‖²: shape (groups, models).
    """

    tensors: Array
    elements: Array
    gram: Array
    bad: Array
    skipped: Array
    largest: Array
    outliers: Array
    signs: Array
    interference: Array
    kept_elements: Array
    kept_squares: Array
    concentrated: Array

    @classmethod
    def zeros(cls, groups: int, models: int) -> GroupSums:
        """The sums of no elements."""
        whole, by_model, kept = np.int64, (groups, models), (groups, models, len(DENSITIES))
        return cls(
            np.zeros(groups, whole), np.zeros(groups, whole), np.zeros((groups, models + 1, models + 1)),
            np.zeros((groups, models + 1), whole), np.zeros(by_model, whole), np.zeros(by_model),
            np.zeros(by_model, whole), np.zeros((groups, 4, models, models), whole),
            np.zeros((groups, 3, models, models)), np.zeros(kept), np.zeros(kept), np.zeros(by_model),
        )  # fmt: skip

    @classmethod
    def of(cls, size: int, found: DifferenceSums) -> GroupSums:
        """The sums of one tensor, as it was measured whole."""
        sums = cls.zeros(1, found.skipped.size)
        sums.tensors[:], sums.elements[:] = 1, size
        for name in ("gram", "bad", "skipped", "largest", "outliers", "interference"):
            getattr(sums, name)[0] = getattr(found, name)
        sums.signs[0] = np.maximum(found.signs, found.signs.swapaxes(1, 2))
        changed = sums.changed[0]
        for model, histogram in enumerate(found.histogram):
            curve = SquaresCurve(histogram)
            sums.kept_elements[0, model] = [min(density * size, changed[model]) for density in DENSITIES]
            sums.kept_squares[0, model] = [curve.squares_in(density * size) for density in DENSITIES]
            sums.kept_squares[0, model] *= found.gram[model, model]
            sums.concentrated[0, model] = curve.elements_with(MOST_SQUARES)
        return sums

    @property
    def changed(self) -> Array:
        """The number of elements of each model that differ from the base, or are not finite in either."""
        changed: Array = np.diagonal(self.signs[:, 0], axis1=1, axis2=2) + self.skipped
        return changed

    def spread(self, models: Sequence[int | None]) -> GroupSums:
        """The same with zeros for further models, whose tensors are the base's own.

        Args:
            models: One per model; None if its tensor is the base's own.
        """
        own = np.flatnonzero([each is not None for each in models])
        if own.size == len(models):
            return self
        found, with_base = GroupSums.zeros(len(self.elements), len(models)), np.append(own, len(models))
        found.tensors, found.elements = self.tensors, self.elements
        found.gram[:, with_base[:, None], with_base] = self.gram
        found.bad[:] = self.bad[:, -1:]
        found.skipped[:] = self.bad[:, -1:]
        found.bad[:, with_base] = self.bad
        for name in ("skipped", "largest", "outliers", "kept_elements", "kept_squares", "concentrated"):
            getattr(found, name)[:, own] = getattr(self, name)
        found.signs[:, :, own[:, None], own] = self.signs
        found.interference[:, :, own[:, None], own] = self.interference
        return found

    @classmethod
    def joined(cls, several: Sequence[GroupSums]) -> GroupSums:
        """The rows of several, one after another."""
        return several[0] if len(several) == 1 else cls(
            *(np.concatenate([vars(each)[name] for each in several]) for name in vars(several[0]))
        )  # fmt: skip

    def rows(self, order: Array) -> GroupSums:
        """Some rows, in an order."""
        return GroupSums(*(value[order] for value in vars(self).values()))

    def added(self, keys: Iterable[object]) -> GroupSums:
        """Rows of the same key added up, in the order of each key's first row.

        Args:
            keys: One per row.
        """
        numbers: dict[object, int] = {}
        index = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
        if len(numbers) == len(index):
            return self
        order = np.argsort(index, kind="stable")
        starts = np.searchsorted(index[order], np.arange(len(numbers)))
        return GroupSums(
            *((np.maximum if name == "largest" else np.add).reduceat(value[order], starts, axis=0)
              for name, value in vars(self).items())
        )  # fmt: skip

    def scaled(self, elements: Array) -> GroupSums:
        """The sums of this many elements in each row, as those of a sample suggest them; counts stay whole."""
        factors, found = elements / self.elements, GroupSums(**vars(self))
        for name, value in vars(self).items():
            if name not in ("tensors", "elements", "largest"):
                own = value * factors.reshape(-1, *(1,) * (value.ndim - 1))
                setattr(found, name, own if value.dtype.kind == "f" else np.rint(own).astype(value.dtype))
        found.elements = elements
        return found

    def groups(self, keys: Sequence[GroupKey]) -> tuple[TensorGroup, ...]:
        """The measures that follow from each row."""
        numbers = _Numbers(self)
        columns = (self.tensors.tolist(), self.elements.tolist(), numbers.base_norm, numbers.base_bad,
                   numbers.changes(), numbers.pairs())  # fmt: skip
        rows = zip(keys, *columns, strict=True)
        return tuple(TensorGroup(*key, *values) for key, *values in rows)


class _Numbers:
    """The measures of all rows at once: array operations are faster than single numbers."""

    def __init__(self, sums: GroupSums) -> None:
        self._sums, self._models = sums, sums.skipped.shape[1]
        self._squares = np.diagonal(sums.gram, axis1=1, axis2=2)
        self._norms = np.sqrt(self._squares)
        self.base_norm, self.base_bad = self._norms[:, -1].tolist(), sums.bad[:, -1].tolist()

    def changes(self) -> list[tuple[Change, ...]]:
        """The measures of each model."""
        sums, elements, norms = self._sums, self._sums.elements[:, None], self._norms
        squares, base = self._squares[:, :-1], self._squares[:, -1:]
        columns = (
            norms[:, :-1].tolist(),
            _share(norms[:, :-1], norms[:, -1:], base > 0),
            _share(elements - sums.changed, elements),
            self._cosines(np.arange(self._models), np.full(self._models, self._models)),
            sums.largest.tolist(),
            sums.outliers.tolist(),
            sums.bad[:, :-1].tolist(),
            _share(sums.concentrated, elements, squares > 0),
            self._kept(),
        )
        return [tuple(map(Change, *row)) for row in zip(*columns, strict=True)]

    def _kept(self) -> list[list[tuple[Kept, ...]]]:
        sums, elements = self._sums, self._sums.elements[:, None, None]
        by_dare = np.multiply.outer(sums.changed - sums.skipped, DENSITIES)
        columns = (
            _share(sums.kept_elements, elements),
            _share(sums.kept_squares, self._squares[:, :-1, None]),
            _share(by_dare, elements),
        )
        return [
            [tuple(map(Kept, DENSITIES, *model)) for model in zip(*row, strict=True)]
            for row in zip(*columns, strict=True)
        ]

    def pairs(self) -> list[tuple[ModelPair, ...]]:
        """The measures of each ordered pair of models."""
        one, other = np.nonzero(~np.eye(self._models, dtype=bool))
        both, opposite, large, opposite_large = self._sums.signs[:, :, one, other].swapaxes(0, 1)
        columns = (
            self._cosines(one, other),
            _share(both, self._sums.elements[:, None]),
            _share(opposite, both),
            _share(opposite_large, large),
            *self._interference(one, other),
        )
        models = one.tolist(), other.tolist()
        return [tuple(map(ModelPair, *models, *row)) for row in zip(*columns, strict=True)]

    def _interference(self, one: Array, other: Array) -> tuple[list[Any], list[Any]]:
        """The roots of the quotients, and their standard errors by error propagation."""
        products, variances, covariances = self._sums.interference[:, :, one, other].swapaxes(0, 1)
        own, own_variances = (self._sums.interference[:, number, one, one] for number in (0, 1))
        defined = own > 0
        own = np.where(defined, own, 1.0)
        ratio = np.sqrt(products / own)
        square = (variances - 2 * covariances * ratio**2 + own_variances * ratio**4) / own
        error = np.sqrt(np.maximum(square / own, 0.0)) / np.where(ratio > 0, 2 * ratio, 1.0)
        defined &= ~(error > MOST_ERROR * ratio)
        return _listed(ratio, defined), _listed(np.where(ratio > 0, error, 0.0), defined)

    def _cosines(self, one: Array, other: Array) -> list[Any]:
        norms = self._norms[:, one] * self._norms[:, other]
        defined = norms > 0
        return _listed((self._sums.gram[:, one, other] / np.where(defined, norms, 1.0)).clip(-1, 1), defined)


class SquaresCurve:
    """The cumulative share of ‖τ‖² in the largest elements of a difference, from a histogram of magnitudes.

    Magnitudes are taken to be uniform within a bin; there are 32 bins per octave.
    """

    def __init__(self, histogram: Array) -> None:
        used = np.flatnonzero(histogram)[::-1]
        low, high = (_value(bits) for bits in (used, used + 1))
        high = np.minimum(high, np.finfo(np.float32).max)
        self._counts = histogram[used].astype(np.float64)
        mean = (low * low + low * high + high * high) / 3
        mean[used == 0] = 0.0  # Zeros and the least subnormals.
        self._elements = np.concatenate([[0.0], np.cumsum(self._counts)])
        squares = np.concatenate([[0.0], np.cumsum(self._counts * mean)])
        self._squares = squares / squares[-1] if squares.size > 1 and squares[-1] > 0 else np.zeros_like(squares)

    def squares_in(self, elements: float) -> float:
        """The share of ‖τ‖² in the ``elements`` largest elements."""
        return float(np.interp(elements, self._elements, self._squares))

    def elements_with(self, share: float) -> float:
        """The fewest elements that have this share of ‖τ‖²; zero if τ is zero."""
        if not self._squares[-1] > 0:
            return 0.0
        return float(np.interp(share, self._squares, self._elements))


def _value(bins: Array) -> Array:
    """The least magnitude of each bin, float64."""
    value: Array = (bins << BIN_SHIFT).astype(np.uint32).view(np.float32).astype(np.float64)
    return value


def _share(part: Array, whole: Array, defined: Array | None = None) -> list[Any]:
    defined = whole > 0 if defined is None else defined
    return _listed(part / np.where(whole > 0, whole, 1), np.broadcast_to(defined, part.shape))


def _listed(values: Array, defined: Array) -> list[Any]:
    """Nested lists of Python numbers; None where they are undefined."""
    if defined.all():
        found: list[Any] = values.tolist()
        return found
    told = values.astype(object)
    told[~defined] = None
    undefined: list[Any] = told.tolist()
    return undefined
