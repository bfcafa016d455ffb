"""Definitions of the measures of ``modelfuse diff``, in float64 over whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from modelfuse.inspection.diff_result import BLOCK, DENSITIES, OUTLYING, Change, ModelPair, TensorGroup

Array = np.ndarray


@dataclass
class Whole:
    """A tensor of the base and its differences in all models, float64.

    Attributes:
        base: The base's values.
        differences: The difference of each model.
        matrices: Splits such a tensor into matrices [outputs, inputs]; None if it is not a layer's matrix.
        columns: The number of columns of the stored matrix.
    """

    base: Array
    differences: list[Array]
    matrices: Callable[[Array], list[Array]] | None = None
    columns: int = 0

    @property
    def block(self) -> int:
        return max(BLOCK // self.columns, 1) * self.columns if self.matrices else BLOCK


def as_stored(each: Array) -> list[Array]:
    return [each]


def turned(each: Array) -> list[Array]:
    return [each.T]


def count(mask: Array) -> int:
    return int(np.count_nonzero(mask))


def norm_of(values: Array) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).sum()))


def over(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def root_mean_squares(values: Array, block: int) -> Array:
    """For each element, the root mean square of its block."""
    flat = values.ravel()
    blocks = [flat[first : first + block] for first in range(0, flat.size, block)]
    return np.concatenate([np.full(each.size, np.sqrt(np.mean(each**2))) for each in blocks])


def change(tensors: Sequence[Whole], model: int) -> dict[str, object]:
    own = [each.differences[model].ravel() for each in tensors]
    base = [each.base.ravel() for each in tensors]
    every, of_base = np.concatenate(own), np.concatenate(base)
    norm = norm_of(every)
    large = [
        np.abs(values) >= OUTLYING * root_mean_squares(values, each.block)
        for values, each in zip(own, tensors, strict=True)
    ]
    return {
        "norm": norm,
        "relative": over(norm, norm_of(of_base)),
        "unchanged": count(every == 0) / every.size,
        "along_base": over(float(every @ of_base), float(norm * norm_of(of_base))),
        "largest": np.abs(every).max(),
        "outliers": sum(int(count(each & (x != 0))) for each, x in zip(large, own, strict=True)),
        "nonfinite": 0,
    }


def squares_in_largest(tensors: Sequence[Whole], model: int, density: float) -> float | None:
    kept = whole = 0.0
    for each in tensors:
        squares = np.sort(each.differences[model].ravel() ** 2)[::-1]
        kept += float(np.interp(density * squares.size, range(squares.size + 1), np.append(0, np.cumsum(squares))))
        whole += float(squares.sum())
    return over(kept, whole)


def fewest_with(tensors: Sequence[Whole], model: int, share: float) -> float | None:
    fewest, any_ = 0.0, False
    for each in tensors:
        squares = np.sort(each.differences[model].ravel() ** 2)[::-1]
        if squares[0] > 0:
            sums = np.append(0, np.cumsum(squares))
            fewest, any_ = fewest + float(np.interp(share, sums / sums[-1], range(sums.size))), True
    return fewest / sum(each.base.size for each in tensors) if any_ else None


def pair(tensors: Sequence[Whole], i: int, j: int) -> dict[str, float | None]:
    one, other = (np.concatenate([each.differences[model].ravel() for each in tensors]) for model in (i, j))
    large = [
        np.concatenate([np.abs(x) >= root_mean_squares(x, each.block)
                        for each in tensors for x in [each.differences[model].ravel()]])
        for model in (i, j)
    ]  # fmt: skip
    both = (one != 0) & (other != 0)
    both_large = both & large[0] & large[1]
    opposite = np.sign(one) != np.sign(other)
    products = [0.0, 0.0]
    for each in tensors:
        if each.matrices is not None:
            for mine, theirs in zip(
                each.matrices(each.differences[i]), each.matrices(each.differences[j]), strict=True
            ):
                products[0] += norm_of(theirs @ mine.T) ** 2
                products[1] += norm_of(mine @ mine.T) ** 2
    ratio = over(*products)
    return {
        "cosine": over(float(one @ other), float(norm_of(one) * norm_of(other))),
        "both_changed": count(both) / one.size,
        "sign_conflict": over(count(both & opposite), count(both)),
        "sign_conflict_large": over(count(both_large & opposite), count(both_large)),
        "interference": None if ratio is None else ratio**0.5,
    }


def near(found: float | None, wanted: Any, close: float, name: str) -> None:
    assert found == (wanted if wanted is None else pytest.approx(wanted, rel=close, abs=close)), name


def hold(group: TensorGroup, tensors: Sequence[Whole], *, sketched: bool = False, close: float = 2e-6) -> None:
    """Compare the measures of some tensors with the definitions."""
    assert (group.tensors, group.elements) == (len(tensors), sum(each.base.size for each in tensors))
    norm = norm_of(np.concatenate([each.base.ravel() for each in tensors]))
    assert group.base_norm == pytest.approx(norm, rel=close)
    for model, own in enumerate(group.models):
        hold_change(own, tensors, model, close)
    numbers = range(len(group.models))
    assert [(each.model, each.other) for each in group.pairs] == [(i, j) for i in numbers for j in numbers if i != j]
    for each in group.pairs:
        hold_pair(each, tensors, sketched, close)


def hold_change(own: Change, tensors: Sequence[Whole], model: int, close: float) -> None:
    for name, wanted in change(tensors, model).items():
        near(getattr(own, name), wanted, close, name)
    changed = 1 - (own.unchanged or 0)
    assert [each.density for each in own.kept] == [*DENSITIES]
    size = sum(each.base.size for each in tensors)
    for kept in own.kept:
        trimmed = sum(min(kept.density * each.base.size, count(each.differences[model])) for each in tensors)
        assert kept.trim_elements == pytest.approx(trimmed / size)
        near(kept.trim_squares, squares_in_largest(tensors, model, kept.density), 0.02, "trim_squares")
        assert kept.dare_elements == pytest.approx(kept.density * changed)
    near(own.density_90, fewest_with(tensors, model, 0.9), 0.02, "density_90")


def hold_pair(own: ModelPair, tensors: Sequence[Whole], sketched: bool, close: float) -> None:
    for name, wanted in pair(tensors, own.model, own.other).items():
        found = getattr(own, name)
        if name == "interference" and sketched and wanted is not None:
            assert own.interference_error is not None
            assert 0 < own.interference_error < 0.3 * wanted
            assert abs(found - wanted) < 4 * own.interference_error
        else:
            near(found, wanted, close, name)
    if not sketched and own.interference is not None:
        assert own.interference_error == 0
