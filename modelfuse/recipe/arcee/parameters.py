"""Values of parameters in a configuration: scalars, gradients over the layers, and filters by the tensor's name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from modelfuse.errors import RecipeError
from modelfuse.recipe.arcee.notes import Notes
from modelfuse.recipe.checks import shown
from modelfuse.recipe.schema import SWITCHES

Scalar = float | int | bool
#: The kind of a parameter's value.
Kind = Literal["number", "count", "switch"]
WORDS: Mapping[Kind, str] = {"number": "a number", "count": "a whole number", "switch": "true or false"}
#: The keys of a value with a filter.
ENTRY_KEYS = ("filter", "value")
#: The most values of a gradient.
MOST_VALUES = 10_000
#: The largest number: about the largest float32, in which tensors are merged.
MOST = 3e38


@dataclass(frozen=True, slots=True)
class FilteredValue:
    """A value for the tensors whose names contain a text.

    Attributes:
        filter: The text; None: all tensors.
        values: One scalar, or a gradient: scalars at equal distances from the first layer to the last.
    """

    filter: str | None
    values: tuple[Scalar, ...]

    def matches(self, name: str) -> bool:
        """Whether it applies to a tensor of this name."""
        return self.filter is None or self.filter in name

    def at(self, depth: float) -> Scalar:
        """The value at a depth between 0, the first layer, and 1, the last.

        >>> FilteredValue(None, (0.0, 1.0, 0.5)).at(0.25)
        0.5
        >>> FilteredValue(None, (True, False, False)).at(0.49)
        True
        """
        position = depth * (len(self.values) - 1)
        before = math.floor(position)
        low = self.values[before]
        if isinstance(low, bool) or before == position:
            return low
        return low + (self.values[before + 1] - low) * (position - before)


#: A parameter in one scope: the first matching entry counts.
Setting = tuple[FilteredValue, ...]
#: The parameters of one scope, by name.
Parameters = Mapping[str, Setting]


def value_of(setting: Setting, name: str, depth: float) -> Scalar | None:
    """The value of a setting for a tensor; None if no entry matches."""
    return next((entry.at(depth) for entry in setting if entry.matches(name)), None)


def depth_of(layer: int, layers: int) -> float:
    """The depth at which gradients are evaluated for a layer of a slice; a single layer has the last value.

    >>> depth_of(1, 3), depth_of(0, 1)
    (0.5, 1.0)
    """
    return layer / (layers - 1) if layers > 1 else 1.0


def read_setting(value: object, kind: Kind, where: str, notes: Notes) -> Setting:
    """Parse the value of a parameter.

    >>> read_setting([{"filter": "mlp", "value": [0, 1]}, {"value": "0.5"}], "number", "t", Notes())
    (FilteredValue(filter='mlp', values=(0, 1)), FilteredValue(filter=None, values=(0.5,)))

    Args:
        value: A scalar, a list of scalars, a map with ``value`` and optionally ``filter``, or a list of those.
        kind: The kind of the parameter.
        where: Its path in the configuration, for errors.
        notes: Receives notes on what has no effect.

    Raises:
        RecipeError: If it is none of these.
    """
    if isinstance(value, Mapping):
        return (_entry(value, kind, where, notes),)
    if isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        return tuple(_entry(each, kind, f"{where}[{number}]", notes) for number, each in enumerate(value))
    return (FilteredValue(None, _scalars(value, kind, where)),)


def _entry(value: Mapping[object, object], kind: Kind, where: str, notes: Notes) -> FilteredValue:
    notes.unknown(value, ENTRY_KEYS, where)
    if "value" not in value:
        raise RecipeError(f"{where} has no value", "Write - filter: TEXT, and value: VALUE below it.")
    text = value.get("filter")
    if text is not None and not isinstance(text, str):
        text = str(text)
    return FilteredValue(None if text == "*" else text, _scalars(value["value"], kind, f"{where}.value"))


def _scalars(value: object, kind: Kind, where: str) -> tuple[Scalar, ...]:
    several: Sequence[object] = value if isinstance(value, list) else [value]
    if not several or len(several) > MOST_VALUES:
        raise RecipeError(f"{where} is a list of {len(several)} values", "Give one value, or some along the layers.")
    read = tuple(scalar(each, kind) for each in several)
    for given, each in zip(several, read, strict=True):
        if each is None:
            raise RecipeError(f"{where} is {shown(given)}, but {WORDS[kind]} is needed")
    return tuple(each for each in read if each is not None)


def scalar(value: object, kind: Kind) -> Scalar | None:
    """Convert one value to a kind; None if it is of another kind.

    >>> scalar("1e-5", "number"), scalar("yes", "switch"), scalar(1.0, "switch"), scalar("many", "count")
    (1e-05, True, True, None)
    """
    if kind == "switch" and isinstance(value, str) and value.lower() in SWITCHES:
        return SWITCHES[value.lower()]
    if isinstance(value, str):
        value = _number(value)
    if not isinstance(value, bool | int | float) or not -MOST <= value <= MOST:  # Also refuses NaN.
        return None
    if kind == "switch":
        return bool(value) if value in (0, 1) else None
    if kind == "count":
        return int(value) if value == int(value) else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else int(value)


def _number(text: str) -> int | float | None:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return None
