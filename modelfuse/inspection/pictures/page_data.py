"""The data of a page: results as columns of numbers, limited in size for large models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from modelfuse.inspection.diff_result import TensorGroup
from modelfuse.inspection.pictures.drawn_result import DrawnResult, Part
from modelfuse.inspection.pictures.measures import MEASURES, Measure, Number
from modelfuse.inspection.pictures.specs import places_spec

Array = np.ndarray[Any, Any]

#: Significant digits of numbers.
DIGITS = 4
#: The most numbers of tensors that share a cell with others, and the fewest tensors; the most changed are taken.
MOST_NUMBERS, LEAST_TENSORS = 400_000, 100


def page_data(shown: DrawnResult) -> dict[str, object]:
    """The data of a page.

    Args:
        shown: The result.
    """
    found, measures = shown.diff, shown.with_values()
    places = shown.places()
    plane = None if places is None else places_spec(places)
    return {
        "models": shown.names,
        "places": plane,
        "places_share": None if places is None else _round(places["share"]),
        "first": measures[0].key,
        "measures": [each.described() for each in measures],
        "whole": _columns(shown, "whole", measures),
        "layers": _columns(shown, "layers", measures),
        "cells": _columns(shown, "cells", measures),
        "tensors": _tensors(shown, measures),
        "errors": [_round(each.interference_error) for each in found.whole.pairs],
        "kept": [[[each.density, _round(each.trim_squares)] for each in change.kept] for change in found.whole.models],
    }


def _columns(shown: DrawnResult, part: Part, measures: Iterable[Measure]) -> dict[str, object]:
    """Groups as columns: one list of values per model or pair and measure."""
    groups = shown.groups(part)
    return {
        "name": [each.name for each in groups],
        "stack": [each.stack for each in groups],
        "layer": [each.layer for each in groups],
        "module": [each.module for each in groups],
        "elements": [each.elements for each in groups],
        "base_norm": [_round(each.base_norm) for each in groups],
        "values": {each.key: _transposed(groups, shown.values(each, part), each) for each in measures},
    }


def _transposed(
    groups: Sequence[TensorGroup], values: Iterable[Sequence[Number]], measure: Measure
) -> list[list[Number]]:
    """One list of values per model or pair; for symmetric measures, one per unordered pair."""
    numbers = np.array([*values], np.float64)
    if not numbers.size:
        return []
    if measure.of == "pair":
        numbers = numbers[:, [pair.model < pair.other for pair in groups[0].pairs]]
    columns: list[list[Number]] = _rounded(numbers.T)
    return columns


def _rounded(values: Array) -> list[Any]:
    """Round to DIGITS significant digits; NaN becomes None.

    >>> _rounded(np.array([123456.0, 0.000123456, -1.0, 0.0, np.nan]))
    [123500.0, 0.0001235, -1.0, 0.0, None]
    """
    sizes = np.abs(values)
    exponents = np.floor(np.log10(np.where(sizes > 0, sizes, 1.0), where=sizes == sizes, out=np.zeros(values.shape)))
    # Quotients of integers by powers of ten are the numbers that decimal notation means.
    above, below = 10.0 ** np.maximum(exponents - DIGITS + 1, 0), 10.0 ** np.maximum(DIGITS - 1 - exponents, 0)
    found = (np.rint(values / above * below) * above / below).astype(object)
    found[np.isnan(values)] = None
    rounded: list[Any] = found.tolist()
    return rounded


def _round(value: Number) -> Number:
    return None if value is None else float(f"{value:.{DIGITS}g}")


def _tensors(shown: DrawnResult, measures: Sequence[Measure]) -> dict[str, object]:
    """The tensors. Values of a tensor that is alone in its cell are the cell's; those of others are listed here."""
    found = shown.diff
    cells = {_place(cell): number for number, cell in enumerate(found.cells) if cell.tensors == 1}
    alone = [cells.get(_place(each)) for each in found.tensors]
    several = [number for number, cell in enumerate(alone) if cell is None]
    most = max(LEAST_TENSORS, MOST_NUMBERS // (len(MEASURES) * (len(found.whole.pairs) + len(found.models))))
    own = sorted(sorted(several, key=lambda number: _size(found.tensors[number]), reverse=True)[:most])
    place = {number: count for count, number in enumerate(own)}
    listed = [number for number, cell in enumerate(alone) if cell is not None or number in place]
    return {
        "name": [found.tensors[number].name for number in listed],
        "elements": [found.tensors[number].elements for number in listed],
        "cell": [alone[number] for number in listed],
        "own": [place.get(number) for number in listed],
        "values": {each.key: _transposed(found.tensors, _picked(shown, each, own), each) for each in measures},
        "dtype": [found.facts[number].dtype for number in listed],
        "shape": [[*found.facts[number].shape] for number in listed],
        "all": len(found.tensors),
    }


def _picked(shown: DrawnResult, measure: Measure, numbers: Sequence[int]) -> list[Sequence[Number]]:
    values = shown.values(measure, "tensors") if numbers else []
    return [values[number] for number in numbers]


def _place(group: TensorGroup) -> tuple[str, int | None, str | None]:
    return group.stack, group.layer, group.module


def _size(group: TensorGroup) -> float:
    """The size of the largest change; tensors with non-finite values come first."""
    changes = group.models
    return max((each.relative or 0.0 for each in changes), default=0.0) + sum(each.nonfinite > 0 for each in changes)
