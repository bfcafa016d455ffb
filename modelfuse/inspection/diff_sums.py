"""Sum the measurements of tensors over layers, modules and models, and compute the reported measures from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelfuse.inspection.diff_measures import DENSITIES, Change, Group, Kept, Pair
from modelfuse.kernels.differences import BIN_SHIFT, DifferenceSums

Array = np.ndarray[Any, Any]

#: The share of ‖τ‖² that ``density_90`` is about.
MOST_SQUARES = 0.9


@dataclass
class TensorSums:
    """Sums over some tensors, for all models.

    Attributes:
        elements: Number of elements.
        sums: The sums of a pass; their histograms are empty.
        kept_elements: Number of elements that trim would leave different from the base, float64, shape
            (models, densities).
        kept_squares: Σ τ² over the largest elements, which trim would keep, float64, shape (models, densities).
        concentrated: The fewest elements with the share MOST_SQUARES of ‖τ‖² of each tensor, float64, shape (models,).
        tensors: Number of tensors.
    """

    elements: int
    sums: DifferenceSums
    kept_elements: Array
    kept_squares: Array
    concentrated: Array
    tensors: int = 1

    @classmethod
    def of(cls, size: int, found: DifferenceSums, models: Sequence[int | None]) -> TensorSums:
        """The sums of one tensor; models that share the base's tensor were not measured and differ by zero.

        Args:
            size: The number of elements.
            found: The measurement of all other models.
            models: For each model the index of its tensor among those that were measured; None: the base's.
        """
        own = np.flatnonzero([each is not None for each in models])
        count, nonzero = len(models), size - _unchanged(found, size)
        sums, square = DifferenceSums.zeros(count), np.ix_(own, own)
        with_base = np.append(own, count)
        sums.gram[np.ix_(with_base, with_base)] = found.gram
        sums.bad[:] = sums.skipped[:] = found.bad[-1]
        sums.bad[with_base] = found.bad
        for name in ("skipped", "largest", "outliers"):
            getattr(sums, name)[own] = getattr(found, name)
        for number in range(len(found.signs)):
            sums.signs[number][square] = np.maximum(found.signs[number], found.signs[number].T)
        for number in range(len(found.interference)):
            sums.interference[number][square] = found.interference[number]
        sums.histogram = np.zeros((count, 0), np.int64)
        kept = np.zeros((2, count, len(DENSITIES)))
        concentrated = np.zeros(count)
        for index, model in enumerate(own):
            curve = SquaresCurve(found.histogram[index])
            square_norm = found.gram[index, index]
            kept[0, model] = [min(density * size, nonzero[index]) for density in DENSITIES]
            kept[1, model] = [square_norm * curve.squares_in(density * size) for density in DENSITIES]
            concentrated[model] = curve.elements_with(MOST_SQUARES)
        return cls(size, sums, kept[0], kept[1], concentrated)

    def scaled(self, elements: int) -> TensorSums:
        """The sums of a tensor of ``elements`` elements, extrapolated from these of a sample."""
        factor = elements / self.elements
        sums = {name: value if name == "largest" else _times(value, factor) for name, value in vars(self.sums).items()}
        return TensorSums(
            elements, DifferenceSums(**sums), factor * self.kept_elements, factor * self.kept_squares,
            factor * self.concentrated, self.tensors,
        )  # fmt: skip

    @classmethod
    def total(cls, several: Iterable[TensorSums]) -> TensorSums:
        """The sums over several; at least one."""
        first, *others = several
        if not others:
            return first
        count = first.concentrated.size
        kept = np.zeros_like(first.kept_elements), np.zeros_like(first.kept_squares)
        whole = cls(0, DifferenceSums.zeros(count), *kept, np.zeros(count), 0)
        whole.sums.histogram = np.zeros((count, 0), np.int64)
        for each in (first, *others):
            whole.sums.add(each.sums)
            for name in ("elements", "kept_elements", "kept_squares", "concentrated", "tensors"):
                setattr(whole, name, getattr(whole, name) + getattr(each, name))
        return whole

    def group(self, name: str, stack: str, layer: int | None, module: str | None) -> Group:
        """The measures that follow from these sums."""
        numbers, models = _Numbers(self), range(self.concentrated.size)
        return Group(
            name, stack, layer, module, self.tensors, self.elements, numbers.gram[-1][-1] ** 0.5, numbers.bad[-1],
            tuple(map(numbers.change, models)),
            tuple(numbers.pair(model, other) for model in models for other in models if other != model),
        )  # fmt: skip


class _Numbers:
    """Sums as Python numbers: single elements of arrays are slow to access."""

    def __init__(self, of: TensorSums) -> None:
        sums = of.sums
        self._elements, self.gram, self.bad = of.elements, sums.gram.tolist(), sums.bad.tolist()
        self._unchanged, self._skipped = _unchanged(sums, of.elements).tolist(), sums.skipped.tolist()
        self._largest, self._outliers = sums.largest.tolist(), sums.outliers.tolist()
        self._signs, self._interference = sums.signs.tolist(), sums.interference.tolist()
        self._kept_elements, self._kept_squares = of.kept_elements.tolist(), of.kept_squares.tolist()
        self._concentrated = of.concentrated.tolist()

    def change(self, model: int) -> Change:
        """The measures of a model."""
        square = self.gram[model][model]
        return Change(
            norm=square**0.5,
            relative=_root(_share(square, self.gram[-1][-1])),
            unchanged=_share(self._unchanged[model], self._elements),
            along_base=self._cosine(model, len(self.gram) - 1),
            largest=self._largest[model],
            outliers=self._outliers[model],
            nonfinite=self.bad[model],
            density_90=_share(self._concentrated[model], self._elements) if square else None,
            kept=tuple(self._kept(model, number, density) for number, density in enumerate(DENSITIES)),
        )

    def _kept(self, model: int, number: int, density: float) -> Kept:
        changed = self._elements - self._unchanged[model] - self._skipped[model]
        return Kept(
            density,
            self._kept_elements[model][number] / self._elements,
            _share(self._kept_squares[model][number], self.gram[model][model]),
            density * changed / self._elements,
        )

    def pair(self, model: int, other: int) -> Pair:
        """The measures of an ordered pair of models."""
        both, opposite, large, opposite_large = (each[model][other] for each in self._signs)
        ratio = _root(_share(self._interference[0][model][other], self._interference[0][model][model]))
        return Pair(
            model, other, self._cosine(model, other), _share(both, self._elements),
            _share(opposite, both), _share(opposite_large, large), ratio, self._error(model, other, ratio),
        )  # fmt: skip

    def _error(self, model: int, other: int, ratio: float | None) -> float | None:
        """The standard error of ``interference``, by error propagation for the root of a quotient of estimates."""
        products, variances, covariances = self._interference
        own = products[model][model]
        if not ratio:
            return ratio
        square = variances[model][other] / own - 2 * covariances[model][other] * ratio**2 / own
        square += variances[model][model] * ratio**4 / own
        return float(max(square / own, 0.0) ** 0.5 / (2 * ratio))

    def _cosine(self, one: int, other: int) -> float | None:
        norms = self.gram[one][one] ** 0.5 * self.gram[other][other] ** 0.5
        return max(-1.0, min(1.0, self.gram[one][other] / norms)) if norms > 0 else None


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


def _unchanged(sums: DifferenceSums, size: int) -> Array:
    """The number of elements of each model that equal the base's, among those that are finite in both."""
    changed = np.array([sums.signs[0, each, each] for each in range(len(sums.skipped))])
    unchanged: Array = size - changed - sums.skipped
    return unchanged


def _times(value: Array, factor: float) -> Array:
    """An array times a factor, in its own type; integers are rounded."""
    scaled: Array = value * factor
    return scaled if value.dtype.kind == "f" else np.rint(scaled).astype(value.dtype)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _root(value: float | None) -> float | None:
    return None if value is None else value**0.5
