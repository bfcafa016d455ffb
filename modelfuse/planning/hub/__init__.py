"""Fetch models that the recipe gives by hub names into huggingface_hub's cache.

A plan is made from the headers first, so that models that do not fit together, and outputs that do not fit on the disk,
are refused before anything large is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from modelfuse.planning.hub.progress import QUIET, FetchDisplay
from modelfuse.recipe.recipe import Recipe

__all__ = ["QUIET", "FetchDisplay", "fetch", "headers"]


def fetch(
    recipe: Recipe,
    display: FetchDisplay | None = None,
    *,
    ask: bool = True,
    check: Callable[[Recipe], int] | None = None,
) -> Recipe:
    """Fetch the files that a merge needs into the cache.

    Args:
        recipe: The merge; returned as it is without hub names.
        display: Shows progress and notes.
        ask: Whether to ask the hub; if not, all files must be in the cache.
        check: Called with a recipe of header-only folders before anything large is fetched; returns the bytes that will
            be written. By default, plans the merge.

    Returns:
        The recipe with a commit and a folder for each hub name.

    Raises:
        HubError: If a model cannot be fetched.
        ModelfuseError: If the plan fails.
    """
    if not recipe.hub_names:
        return recipe
    from modelfuse.planning.hub.download import fetch_models

    return fetch_models(recipe, display or FetchDisplay(), ask, check)


def headers(recipe: Recipe, display: FetchDisplay | None = None) -> AbstractContextManager[Recipe]:
    """Fetch the files that a plan needs; of safetensors files that are not in the cache, only the headers.

    Returns:
        A context manager that gives the recipe with a commit and a folder for each hub name. Header-only folders are
        removed at its end.

    Raises:
        HubError: If a model cannot be fetched.
        OutputError: If the output exists already.
    """
    if not recipe.hub_names:
        return nullcontext(recipe)
    from modelfuse.planning.hub.download import fetch_headers

    return fetch_headers(recipe, display or FetchDisplay())
