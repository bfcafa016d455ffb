"""What a page is drawn from: results as columns of numbers, small enough for large models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from modelfuse.inspection.diff_result import Group
from modelfuse.inspection.pictures.measures import MEASURES, Measure, Number
from modelfuse.inspection.pictures.shown import Part, Shown
from modelfuse.inspection.pictures.specs import places_spec

Array = np.ndarray[Any, Any]

#: Digits that a picture can show.
DIGITS = 4
#: Numbers of tensors that share a cell, those with the largest changes; and at least so many tensors.
MOST_NUMBERS, LEAST_TENSORS = 400_000, 100


def page_data(shown: Shown) -> dict[str, object]:
    """Everything that a page shows.

    Args:
        shown: What was found.
    """
    found, measures = shown.diff, shown.telling()
    places = shown.places()
    return {
        "models": shown.names,
        "places": None if places is None else places_spec(places),
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


def _columns(shown: Shown, part: Part, measures: Iterable[Measure]) -> dict[str, object]:
    """Groups as columns: a list of numbers for each model or pair."""
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


def _transposed(groups: Sequence[Group], values: Iterable[Sequence[Number]], measure: Measure) -> list[list[Number]]:
    """The numbers of each model, or of each pair; of what is the same both ways, once."""
    numbers = np.array([*values], np.float64)
    if not numbers.size:
        return []
    if measure.of == "pair":
        numbers = numbers[:, [pair.model < pair.other for pair in groups[0].pairs]]
    columns: list[list[Number]] = _rounded(numbers.T)
    return columns


def _rounded(values: Array) -> list[Any]:
    """Numbers of DIGITS digits; None for NaN.

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


def _tensors(shown: Shown, measures: Sequence[Measure]) -> dict[str, object]:
    """The tensors: the numbers of one that is alone in its cell are the cell's, those of others stand here."""
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


def _picked(shown: Shown, measure: Measure, numbers: Sequence[int]) -> list[Sequence[Number]]:
    values = shown.values(measure, "tensors") if numbers else []
    return [values[number] for number in numbers]


def _place(group: Group) -> tuple[str, int | None, str | None]:
    return group.stack, group.layer, group.module


def _size(group: Group) -> float:
    """How much a tensor changed, before others where values are not finite."""
    changes = group.models
    return max((each.relative or 0.0 for each in changes), default=0.0) + sum(each.nonfinite > 0 for each in changes)
