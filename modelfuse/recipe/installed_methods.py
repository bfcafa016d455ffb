"""Methods of other packages: those that installed ones declare by an entry point."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from modelfuse.errors import RecipeError
from modelfuse.methods.registry import register
from modelfuse.methods.spec import Method

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

#: An entry point of this group names a Method, or several.
GROUP = "modelfuse.methods"


@cache
def register_installed() -> bool:
    """Register them, the first time; looking for them takes longer than planning a merge, so it is done when needed.

    Returns:
        Whether there are any.

    Raises:
        RecipeError: If one cannot be loaded, or has a name that there is already.
    """
    from importlib.metadata import entry_points

    points = tuple(entry_points(group=GROUP))
    for point in points:
        try:
            register_all(_methods(point))
        except RecipeError:
            raise
        except Exception as error:  # Of somebody's own code.
            raise RecipeError(
                f"The method {point.name} of {_package(point)} cannot be loaded: {type(error).__name__}: {error}",
                f"Repair or uninstall {_package(point)}.",
            ) from error
    return bool(points)


def register_all(methods: Iterable[Method]) -> None:
    """Register methods.

    Raises:
        RecipeError: If one has a name that there is already, or is none.
    """
    for method in methods:
        if not isinstance(method, Method):
            raise RecipeError(f"{method!r} is no method", "Declare it as a modelfuse.methods.spec.Method.")
        try:
            register(method)
        except ValueError as error:
            raise RecipeError(
                f"The method {method.name} cannot be registered: {error}", "Name it otherwise."
            ) from error


def _methods(point: EntryPoint) -> Iterable[Method]:
    found = point.load()
    return (found,) if isinstance(found, Method) else tuple(found)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "a package"
