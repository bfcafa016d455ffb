"""Signatures and docstrings with all settings, for notebooks."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from keyword import iskeyword
from typing import Any, ParamSpec, TypeVar

from modelfuse.api.keywords import Keywords
from modelfuse.cli.help import default_of
from modelfuse.recipe.names import SETTINGS

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")
#: The functions that take settings, with their signatures and docstrings without settings.
_TAKING: list[tuple[Callable[..., Any], inspect.Signature, str]] = []


def with_settings(function: Callable[Arguments, Value]) -> Callable[Arguments, Value]:
    """Decorate a function that takes settings: adds them to its signature and docstring."""
    _TAKING.append((function, inspect.signature(function), inspect.cleandoc(function.__doc__ or "")))
    describe()
    return function


def describe() -> None:
    """Update the signatures and docstrings of all decorated functions to the current settings."""
    for function, plain, text in _TAKING:
        own = [each for each in plain.parameters.values() if each.kind is not each.VAR_KEYWORD]
        parameters = sorted([*_parameters(), *own], key=lambda each: each.kind)
        function.__signature__ = plain.replace(parameters=parameters)  # type: ignore[attr-defined]
        head, arguments, rest = text.partition("Args:\n")
        if not arguments:
            head, returns, rest = text.partition("Returns:\n")
            rest = f"\n{returns}{rest}"
        function.__doc__ = f"{head}Args:\n{_listed()}\n{rest}"


def argument(name: str) -> str:
    """The name of a setting as a Python argument, such as ``lambda_``."""
    return f"{name}_" if iskeyword(name) else name


def _parameters() -> Iterator[inspect.Parameter]:
    for plain, setting in SETTINGS.items():
        name = argument(plain)
        default = inspect.Parameter.empty if setting.is_required else setting.default
        annotation = Keywords.__annotations__.get(name, inspect.Parameter.empty)
        if isinstance(annotation, str) or hasattr(annotation, "__forward_arg__"):
            annotation = getattr(annotation, "__forward_arg__", annotation)
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _listed() -> str:
    lines = []
    for name, setting in zip(map(argument, SETTINGS), SETTINGS.values(), strict=True):
        default = "Required." if setting.is_required else f"Default: {default_of(setting)}."
        choices = f"One of {', '.join(setting.choices)}. " if setting.choices else ""
        lines.append(
            textwrap.fill(
                f"{name}: {setting.description} {choices}{default}",
                100,
                initial_indent=" " * 4,
                subsequent_indent=" " * 8,
            )
        )
    return "\n".join(lines)
