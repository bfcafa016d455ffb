"""Parse marks in a recipe: ``{tune: [0, 1.5]}`` in place of a number, optionally with ``log: true``, ``start: 0.3``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress

from modelfuse.errors import RecipeError
from modelfuse.execution.tuning.search_space import Dimension, Space, weights_of
from modelfuse.recipe.checks import shown
from modelfuse.recipe.files import load_documents
from modelfuse.recipe.method_settings import FACTOR, METHOD_SETTINGS
from modelfuse.recipe.names import SETTINGS, canonical, canonical_name
from modelfuse.recipe.schema import LARGEST

MARK, OPTIONS = "tune", ("log", "start")
#: Settings that may be marked, besides those of methods.
ALSO = ("seed",)


def read_space(settings: Mapping[str, object]) -> Space:
    """The search space of a recipe with marks.

    Args:
        settings: The settings of the recipe.

    Raises:
        RecipeError: If a mark is invalid, or the setting takes no number.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if isinstance(given.get("mergekit"), str):
        documents = load_documents(str(given["mergekit"]))
        return Space({**given, "mergekit": [_read(each, (f"document {at}",) if at else (), None)
                                            for at, each in enumerate(documents)]})  # fmt: skip
    named = canonical({name: value for name, value in given.items() if not _has_mark(value)})
    models = _count(named.get("model_path_list"))
    tree: dict[str, object] = {}
    for name, value in {**named, **_marked(given)}.items():
        tree[name] = _read(value, (name,), models) if _has_mark(value) else value
    return Space(tree)


def _marked(given: Mapping[str, object]) -> dict[str, object]:
    """The settings that contain marks, by canonical name.

    Raises:
        RecipeError: If there is no such setting, or it cannot be searched.
    """
    found = dict[str, object]()
    for name, value in given.items():
        if _has_mark(value):
            plain = canonical_name(name)
            if plain != "rules" and not (_is_number(plain) and (plain in METHOD_SETTINGS or plain in ALSO)):
                raise RecipeError(f"{plain} cannot be searched: only settings of methods that are numbers can be")
            found[plain] = value
    return found


def _is_number(name: str) -> bool:
    return SETTINGS[name].is_number or name == FACTOR


def _count(models: object) -> int | None:
    if isinstance(models, str) or not isinstance(models, Sequence):
        return 1 if models is not None else None
    return len(models)


def _has_mark(value: object) -> bool:
    if isinstance(value, Mapping):
        return MARK in value or any(map(_has_mark, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_mark, value))


def _read(value: object, path: tuple[str, ...], models: int | None) -> object:
    """A part of a recipe with its marks replaced by dimensions."""
    if isinstance(value, Mapping) and MARK in value:
        return _dimension(value, path, models)
    if isinstance(value, Mapping):
        return {key: _read(each, (*path, str(key)), models) for key, each in value.items()}
    if isinstance(value, list | tuple):
        names = {"rules": "rule"}
        head, last = path[:-1], path[-1] if path else ""
        return [_read(each, (*head, f"{names.get(last, last)} {at}"), models) for at, each in enumerate(value, 1)]
    return value


def _dimension(mark: Mapping[str, object], path: tuple[str, ...], models: int | None) -> object:
    name = " ".join(path)
    if unknown := [key for key in mark if key not in (MARK, *OPTIONS)]:
        raise RecipeError(f"{name}: {MARK} has no option {unknown[0]!r}", f"Its options are {' and '.join(OPTIONS)}.")
    ends = mark[MARK]
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        raise RecipeError(f"{name}: {MARK} is {shown(ends)}", f"Give the two ends of a range: {{{MARK}: [0, 1.5]}}.")
    share = all(isinstance(each, str) and each.strip().startswith("norm") for each in ends)
    low, high = (_number(each, name) for each in ends)
    if not low < high:
        raise RecipeError(f"{name}: {MARK} is {shown(ends)}, but the first should be less than the second")
    log = mark.get("log", False)
    if not isinstance(log, bool) or (log and low <= 0):
        raise RecipeError(
            f"{name}: log is {shown(log)}, for {low:g} to {high:g}", "It takes true, for numbers above 0."
        )
    setting = SETTINGS.get(path[-1].split(" ")[0]) if models is not None or path[0] in SETTINGS else None
    whole = setting is not None and setting.is_number and not setting.is_fraction
    start = _number(mark["start"], name) if "start" in mark else None
    if start is not None and not low <= start <= high:
        raise RecipeError(f"{name}: start is {start:g}, which is not within {low:g} and {high:g}")
    if path[-1] == "weight_list" and setting is not None:
        if models is None:
            raise RecipeError("model_path_list is not given")
        return weights_of(
            " ".join((*path[:-1], "weight")), models, low, high, None if start is None else [start] * models
        )
    if start is None:
        start = _usual_start(path[-1], low, high, log, 0.6 if share else None)
    return Dimension(name, low, high, start, log, whole, share)


def _usual_start(setting: str, low: float, high: float, log: bool, usual: float | None) -> float:
    """``usual``, or else the setting's default, if it is within the range; else the middle of the range."""
    default = 1.0 if setting == FACTOR else SETTINGS[setting].default if setting in SETTINGS else None
    usual = usual if usual is not None else default if isinstance(default, int | float) else None
    if usual is not None and low <= usual <= high:
        return float(usual)
    return math.sqrt(low * high) if log else (low + high) / 2


def _number(value: object, name: str) -> float:
    with suppress(ValueError, TypeError):
        number = float(re.sub(r"^\s*norm[\s:=]+", "", value) if isinstance(value, str) else value)  # type: ignore[arg-type]
        if not isinstance(value, bool) and abs(number) <= LARGEST:
            return number
    raise RecipeError(f"{name}: {shown(value)} is not a number")
