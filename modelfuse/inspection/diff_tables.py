"""Tables of a comparison: pandas DataFrames, and HTML for notebooks."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, Protocol, get_args

from modelfuse.errors import MissingExtraError, RecipeError
from modelfuse.inspection.diff_measures import Change, Kept, ModelPair, Suggestion, TensorGroup
from modelfuse.inspection.diff_names import short_names
from modelfuse.planning.tables import Row, html

Level = Literal["tensors", "layers", "modules", "cells", "whole"]
LEVELS: tuple[str, ...] = get_args(Level)
#: Fields that identify a group.
WHERE = ("name", "stack", "layer", "module", "tensors", "elements")
#: Fields of models and pairs that become columns of the same name.
OF_CHANGES = tuple(each for each in Change.__struct_fields__ if each != "kept")
OF_PAIRS = tuple(each for each in ModelPair.__struct_fields__ if each not in ("model", "other"))


class ComparedModels(Protocol):
    """The parts of a :class:`~modelfuse.inspection.diff_result.Diff` that tables need."""

    @property
    def models(self) -> tuple[str, ...]: ...
    @property
    def whole(self) -> TensorGroup: ...
    @property
    def findings(self) -> tuple[str, ...]: ...
    @property
    def advice(self) -> tuple[Suggestion, ...]: ...


def frame_of(found: ComparedModels, level: Level, pairs: bool) -> Any:
    """A DataFrame of the measures; see :meth:`modelfuse.Diff.to_pandas`."""
    if level not in LEVELS:
        raise RecipeError(f"There is no level {level!r}", f"Levels are {', '.join(LEVELS)}.")
    if find_spec("pandas") is None:
        raise MissingExtraError("to_pandas needs pandas, which is not installed", "pip install pandas")
    groups = [found.whole] if level == "whole" else getattr(found, level)
    rows = [row for group in groups for row in (_pairs if pairs else _changes)(found, group)]
    frame = import_module("pandas").DataFrame(rows)
    frame["layer"] = frame["layer"].astype("Int64")
    return frame


def _changes(found: ComparedModels, group: TensorGroup) -> Iterator[dict[str, object]]:
    where = {name: getattr(group, name) for name in WHERE}
    for name, change in zip(short_names(found.models), group.models, strict=True):
        kept = {
            f"{each}_{own.density:g}": getattr(own, each)
            for own in change.kept
            for each in Kept.__struct_fields__
            if each != "density"
        }
        yield {**where, "model": name, **{each: getattr(change, each) for each in OF_CHANGES}, **kept}


def _pairs(found: ComparedModels, group: TensorGroup) -> Iterator[dict[str, object]]:
    where, names = {name: getattr(group, name) for name in WHERE}, short_names(found.models)
    for pair in group.pairs:
        own = {each: getattr(pair, each) for each in OF_PAIRS}
        yield {**where, "model": names[pair.model], "other": names[pair.other], **own}


def html_of(found: ComparedModels) -> str:
    """HTML for a notebook: the models, their interference, findings and advice."""
    names = short_names(found.models)
    models: list[Row] = [
        (name, _number(each.relative), _number(each.unchanged), _number(each.density_90), each.outliers, each.nonfinite)
        for name, each in zip(names, found.whole.models, strict=True)
    ]
    titles = ("model", "‖τ‖/‖b‖", "unchanged", "90 % of ‖τ‖²", "outlying", "NaN, inf")
    tables: list[tuple[Any, list[Row]]] = [(titles, models)]
    if len(names) > 1:
        numbers = range(len(names))
        tables.append((
            ("interference: who suffers", *(f"from {name}" for name in names)),
            [(names[i], *("" if i == j else _number(found.whole.pair(i, j).interference) for j in numbers))
             for i in numbers],
        ))  # fmt: skip
    advice = [f"worth trying: {each.text} ({each.flags})" for each in found.advice]
    return html(repr(found)[1:-1], *tables, notes=(*found.findings, *advice))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
