"""What a page is drawn from: results as columns of numbers, small enough for large models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from modelfuse.inspection.diff_result import Diff, Group
from modelfuse.inspection.pictures.measures import MEASURES, Measure, Number

#: Digits that a picture can show.
DIGITS = 4
#: Numbers of tensors that share a cell, those with the largest changes; and at least so many tensors.
MOST_NUMBERS, LEAST_TENSORS = 400_000, 100
#: What is listed of the rest.
MOST_LISTED = 200


def page_data(found: Diff) -> dict[str, object]:
    """Everything that a page shows.

    Args:
        found: How models differ.
    """
    measures = _measured(found)
    return {
        "base": found.base,
        "base_given": found.base_given,
        "models": labels(found.models),
        "paths": [*found.models],
        "first": measures[0].key,
        "exact": found.exact,
        "bytes_read": found.bytes_read,
        "measures": [each.described() for each in measures],
        "findings": [*found.findings],
        "whole": _columns([found.whole], measures),
        "layers": _columns(found.layers, measures),
        "cells": _columns(found.cells, measures),
        "tensors": _tensors(found, measures),
        "kept": [[[each.density, _round(each.trim_squares)] for each in change.kept] for change in found.whole.models],
        "beside": [[each.model, each.text, each.fatal] for each in found.side_differences[:MOST_LISTED]],
        "not_compared": [[each.tensor, each.because] for each in found.not_compared[:MOST_LISTED]],
        "more_beside": max(0, len(found.side_differences) - MOST_LISTED),
        "more_not_compared": max(0, len(found.not_compared) - MOST_LISTED),
    }


def labels(paths: Sequence[str]) -> list[str]:
    """Short names of models that tell them apart: the ends of their paths.

    >>> labels(["/a/code", "/b/prose"]), labels(["/a/model", "/b/model"]), labels(["x", "x"])
    (['code', 'prose'], ['a/model', 'b/model'], ['x', 'x (2)'])
    """
    parts = [path.rstrip("/").split("/") for path in paths]
    depth, most = 1, max(map(len, parts), default=1)
    while depth < most and len({tuple(each[-depth:]) for each in parts}) < len(set(paths)):
        depth += 1
    found = ["/".join(each[-depth:]) or path for each, path in zip(parts, paths, strict=True)]
    before = [found[:number].count(each) for number, each in enumerate(found)]
    return [f"{each} ({count + 1})" if count else each for each, count in zip(found, before, strict=True)]


def _measured(found: Diff) -> list[Measure]:
    """The measures that say anything here."""
    groups = (found.whole, *found.cells)
    return [each for each in MEASURES.values()
            if any(value is not None for group in groups for value in each.values(group))
            and (each.key != "nonfinite" or any(any(each.values(group)) for group in groups))]  # fmt: skip


def _columns(groups: Sequence[Group], measures: Iterable[Measure]) -> dict[str, object]:
    """Groups as columns: a list of numbers for each model or pair."""
    return {
        "name": [each.name for each in groups],
        "stack": [each.stack for each in groups],
        "layer": [each.layer for each in groups],
        "module": [each.module for each in groups],
        "elements": [each.elements for each in groups],
        "base_norm": [_round(each.base_norm) for each in groups],
        "values": {each.key: _transposed(groups, each) for each in measures},
    }


def _transposed(groups: Sequence[Group], measure: Measure) -> list[list[Number]]:
    """The numbers of each model, or of each pair; of what is the same both ways, once."""
    rows = [[_round(value) for value in measure.values(group)] for group in groups]
    columns = [list(column) for column in zip(*rows, strict=True)]
    if measure.of == "pair" and groups:
        pairs = groups[0].pairs
        return [column for pair, column in zip(pairs, columns, strict=True) if pair.model < pair.other]
    return columns


def _round(value: Number) -> Number:
    return None if value is None else float(f"{value:.{DIGITS}g}")


def _tensors(found: Diff, measures: Sequence[Measure]) -> dict[str, object]:
    """The tensors: the numbers of one that is alone in its cell are the cell's, those of others stand here."""
    cells = {_place(cell): number for number, cell in enumerate(found.cells) if cell.tensors == 1}
    alone = [cells.get(_place(each)) for each in found.tensors]
    several = [number for number, cell in enumerate(alone) if cell is None]
    most = max(LEAST_TENSORS, MOST_NUMBERS // (len(MEASURES) * (len(found.whole.pairs) + len(found.models))))
    own = sorted(sorted(several, key=lambda number: _size(found.tensors[number]), reverse=True)[:most])
    place = {number: count for count, number in enumerate(own)}
    shown = [number for number, cell in enumerate(alone) if cell is not None or number in place]
    return {
        "name": [found.tensors[number].name for number in shown],
        "elements": [found.tensors[number].elements for number in shown],
        "cell": [alone[number] for number in shown],
        "own": [place.get(number) for number in shown],
        "values": _columns([found.tensors[number] for number in own], measures)["values"],
        "dtype": [found.facts[number].dtype for number in shown],
        "shape": [[*found.facts[number].shape] for number in shown],
        "all": len(found.tensors),
    }


def _place(group: Group) -> tuple[str, int | None, str | None]:
    return group.stack, group.layer, group.module


def _size(group: Group) -> float:
    """How much a tensor changed, before others where values are not finite."""
    changes = group.models
    return max((each.relative or 0.0 for each in changes), default=0.0) + sum(each.nonfinite > 0 for each in changes)
