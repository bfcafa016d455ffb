"""Types of single settings: sizes, numbers, paths, and the inputs of a merge."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

from msgspec import Meta, ValidationError, convert

from modelfuse.errors import RecipeError
from modelfuse.recipe.checks import HELP, is_path, listed, shown
from modelfuse.recipe.hub_names import HUB_SCHEME, HubName, hub_name
from modelfuse.recipe.sizes import parse_bytes
from modelfuse.storage import PathOrUrl, Url, path_or_url

#: Words that Paddle's tool accepts for true and false.
SWITCHES = {**dict.fromkeys(("yes", "true", "t", "y", "1", "on"), True),
            **dict.fromkeys(("no", "false", "f", "n", "0", "off"), False)}  # fmt: skip
#: Names of types in messages.
WORDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "text", "array": "a list",
         "object": "a map", "null": "none"}  # fmt: skip


def _absolute(value: object) -> PathOrUrl:
    if isinstance(value, str) and not is_path(value):
        raise ValueError("this is no path")
    if not isinstance(value, str | Path | Url):
        raise ValueError("input is not a valid path")
    if isinstance(value, str) and value.startswith(HUB_SCHEME):
        raise ValueError("a hub takes finished models: give a folder, and send it by `modelfuse push FOLDER org/model`")
    return path_or_url(value)


def read_input(value: object) -> PathOrUrl | HubName:
    """A path or URL; or a hub name, if it looks like one and no such path exists."""
    if isinstance(value, str) and not os.path.lexists(value) and (named := hub_name(value)) is not None:
        return named
    if isinstance(value, str) and value.startswith(HUB_SCHEME):
        raise ValueError(f"this is no model on a hub; those are {HUB_SCHEME}organization/model, or with @revision")
    return value if isinstance(value, HubName) else _absolute(value)


def _endpoint(value: object) -> object:
    if isinstance(value, str) and re.match(r"https?://[^/\s]+", value) is None:
        raise ValueError("this is no address such as https://hub.example.org")
    return value.rstrip("/") if isinstance(value, str) else value


def read_factor(value: object) -> float | str:
    """A number, or the text ``norm`` and a share.

    >>> read_factor("0.5"), read_factor("norm 0.80")
    (0.5, 'norm 0.8')
    """
    word = re.fullmatch(r"\s*norm[\s:=]+(\S+)\s*", value) if isinstance(value, str) else None
    number = _number(_plain(word[1] if word is not None else value))
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError("give a number, or norm and a share, such as 'norm 0.6'")
    if word is not None and number <= 0:
        raise ValueError("the share of the norm should be above 0")
    if not abs(number) <= LARGEST:
        raise ValueError(f"give a number within ±{LARGEST:g}")
    return float(number) if word is None else f"norm {float(number):g}"


#: The most values of a list; longer ones are refused before any value is read.
MOST_VALUES = 10_000


@dataclass(frozen=True, slots=True)
class Before:
    """Metadata of a setting's type: converts a given value before it is checked.

    Attributes:
        read: Raises ValueError if the value cannot be understood.
    """

    read: Callable[[Any], object]


@dataclass(frozen=True, slots=True)
class Instead(Before):
    """Converts a given value, which is then not checked further."""


Bytes = Annotated[int, Before(parse_bytes), Meta(le=2**63 - 1)]
#: A path, made absolute, or a URL.
AbsolutePath = Annotated[PathOrUrl, Instead(_absolute)]
#: The largest number: about the largest float32, in which most tensors are merged.
LARGEST = 3e38
Weight = Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]
#: The factor on the merged difference.
Factor = Annotated[float | str, Instead(read_factor)]
Endpoint = Annotated[str, Before(_endpoint)]
#: A model to merge: a path, a URL or a hub name.
Input = Annotated[PathOrUrl | HubName, Instead(read_input)]
#: A word, or a model.
TokenizerChoice = Annotated[PathOrUrl | HubName | str, Instead(lambda value: _word_or_input(value))]


NOUNS: Mapping[object, str] = {_absolute: "PATH", read_input: "MODEL", _endpoint: "URL", read_factor: "N"}


def _word_or_input(value: object) -> object:
    return value if value in ("union", "base") else read_input(value)


def setting(default: object, description: str, otherwise: str = "", **bounds: Any) -> Any:
    """A dataclass field for a setting.

    Args:
        default: The default; ``MISSING`` if it is required.
        description: The help text.
        otherwise: The default in words, if the value does not explain itself.
        bounds: Bounds of numbers, as in msgspec's ``Meta``.
    """
    return field(
        default=default, metadata={"description": description, "otherwise": otherwise, "bounds": Meta(**bounds)}
    )


T = TypeVar("T")


class PerModel(Generic[T]):
    """The type of a setting that is one value for all models, or a list with one per model."""


class InvalidValue(ValueError):
    """Raised for an invalid value of a setting.

    Attributes:
        value: The given value; for a list, the first invalid one.
        reason: What is expected.
    """

    def __init__(self, value: object, reason: str) -> None:
        super().__init__(reason)
        self.value, self.reason = value, reason


class Setting:
    """The type and the default of a setting.

    Args:
        kind: The type of the dataclass field.
        made: The field.

    Attributes:
        default: The default; ``MISSING`` if it is required.
        description: The help text.
        otherwise: The default in words, if the value does not explain itself; else empty.
        takes_several: Whether it is a list.
        is_per_model: Whether it is one value, or a list with one per model.
        aliases: Its names in other tools.
        choices: The allowed values, if they can be listed.
        is_switch: Whether it is true or false.
        is_number: Whether it is a number.
        is_fraction: Whether it is a number that need not be an integer.
        is_size: Whether it is a size in bytes.
        noun: The placeholder of its value in help, in capitals, for other types.
    """

    def __init__(self, kind: Any, made: Field[Any]) -> None:
        self.default, self.description = made.default, str(made.metadata["description"])
        self.otherwise, self.aliases = str(made.metadata["otherwise"]), tuple[str, ...]()
        # None only stands for the default.
        some = next(each for each in get_args(kind) if each is not NoneType) if NoneType in get_args(kind) else kind
        self.is_per_model = get_origin(some) is PerModel
        some = get_args(some)[0] if self.is_per_model else some
        self.takes_several = get_origin(some) is tuple
        one = get_args(some)[0] if self.takes_several else some
        self._kind = Annotated[one, made.metadata["bounds"]]
        plain = get_args(one)[0] if get_origin(one) is Annotated else one
        self._readers = [each for each in getattr(one, "__metadata__", ()) if isinstance(each, Before)]
        self.choices = [str(each) for each in get_args(plain)] if get_origin(plain) is Literal else []
        self.is_switch, self.is_number, self.is_fraction = plain is bool, plain in (int, float), plain is float
        self.is_size = any(each.read is parse_bytes for each in self._readers)
        self.noun = next((NOUNS[each.read] for each in self._readers if each.read in NOUNS), "TEXT")

    @property
    def is_required(self) -> bool:
        """Whether it is required."""
        return self.default is MISSING

    def read(self, value: object) -> object:
        """Convert and check a given value.

        Raises:
            InvalidValue: If it is invalid.
        """
        if value is None and self.default is None:
            return None
        if not self.takes_several and not self.is_per_model:
            return self._read(value)
        try:
            if isinstance(value, str | bytes | Mapping | Set):
                raise TypeError
            several = [*value]  # type: ignore[misc]
        except Exception:
            if self.is_per_model:
                return self._read(value)
            raise InvalidValue(value, "give a list") from None
        if len(several) > MOST_VALUES:
            raise InvalidValue(several[:3], f"and {len(several) - 3:,} more values; give at most {MOST_VALUES:,}")
        read = tuple(map(self._read, several))
        return read[0] if self.is_per_model and len(read) == 1 else read

    def _read(self, given: object) -> object:
        value = given
        try:
            for reader in self._readers:
                value = reader.read(value)
                if isinstance(reader, Instead):
                    return value
            if self.is_number or self.is_switch:
                value = _plain(value)
            if self.is_number:
                value = _number(value)
            elif self.is_switch and isinstance(value, str):
                value = SWITCHES.get(value.lower(), value)
            read: object = convert(value, self._kind, strict=False)
            if isinstance(read, float) and not math.isfinite(read):
                raise ValueError("give a finite number")
        except ValidationError as error:
            choices = ", ".join(map(repr, self.choices))
            raise InvalidValue(given, f"give one of {choices}" if choices else _in_words(error)) from None
        except ValueError as error:
            raise InvalidValue(given, str(error)) from None
        return read


def checked(settings: Mapping[str, Setting], values: Mapping[str, object]) -> dict[str, object]:
    """Convert and check all settings.

    Raises:
        RecipeError: If any are invalid; lists all of them.
    """
    read, problems = dict[str, object](), list[str]()
    for name, each in settings.items():
        try:
            if values[name] is MISSING:
                problems.append(f"{name} is not given")
            else:
                read[name] = each.read(values[name])
        except InvalidValue as error:
            marked = isinstance(error.value, Mapping) and "tune" in error.value
            reason = "only `modelfuse tune` searches numbers" if marked else error.reason
            problems.append(f"{name} is {shown(error.value)}: {reason}")
    if problems:
        raise RecipeError(listed(problems), HELP)
    return read


def as_json(value: object) -> object:
    """A setting as a JSON value; URLs without their secrets."""
    if type(value) is tuple:
        return [as_json(each) for each in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def settings_of(kind: type) -> dict[str, Setting]:
    """The settings among a dataclass's fields, by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {made.name: Setting(hints[made.name], made) for made in fields(kind) if made.metadata}


def _plain(value: Any) -> object:
    """Convert a number of numpy or torch to a Python number; other values unchanged."""
    if type(value) in (str, bool, int, float, NoneType):
        return value
    if isinstance(value, int | float):
        return float(value) if isinstance(value, float) else int(value)
    try:
        return value.item()
    except Exception:  # A given object may raise anything.
        return value


def _number(value: object) -> object:
    """Convert a number that was given as text, as on a command line; other values unchanged."""
    if isinstance(value, str):
        for kind in (int, float):
            with suppress(ValueError):
                value = kind(value)
                break
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("give a finite number")
        return int(value) if value.is_integer() else value
    return value


def _in_words(error: ValidationError) -> str:
    """msgspec's message in plain words."""
    text = re.sub(r"`(\w+)`", lambda word: WORDS.get(word[1], word[1]), str(error))
    return text[0].lower() + text[1:]
