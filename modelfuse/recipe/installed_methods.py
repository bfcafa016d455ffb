"""Methods from installed packages, declared by entry points."""

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
    """Register the methods of installed packages, once; done lazily, as the search takes longer than a plan.

    Returns:
        Whether there are any.

    Raises:
        RecipeError: If one cannot be loaded, or its name is taken.
    """
    from importlib.metadata import entry_points

    points = tuple(entry_points(group=GROUP))
    for point in points:
        try:
            register_all(_methods(point))
        except RecipeError:
            raise
        except Exception as error:  # Code of another package may raise anything.
            raise RecipeError(
                f"The method {point.name} of {_package(point)} cannot be loaded: {type(error).__name__}: {error}",
                f"Repair or uninstall {_package(point)}.",
            ) from error
    return bool(points)


def register_all(methods: Iterable[Method]) -> None:
    """Register methods.

    Raises:
        RecipeError: If one is not a method, or its name is taken.
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
