"""Models that a recipe names as they are called on a hub become folders of the cache.

What the merge needs of all of them is fetched at once, after a plan was made of the headers alone: so models that do
not fit together, or an output that finds no room, are refused before hours of downloading.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from modelfuse.planning.hub.progress import QUIET, Watch
from modelfuse.recipe.recipe import Recipe

__all__ = ["QUIET", "Watch", "fetch", "headers"]


def fetch(
    recipe: Recipe, watch: Watch | None = None, *, ask: bool = True, check: Callable[[Recipe], int] | None = None
) -> Recipe:
    """Bring what a merge needs into the cache.

    Args:
        recipe: The merge; nothing is done if it has no hub names.
        watch: What is shown.
        ask: Whether to ask the hub; without, all must be in the cache.
        check: Called with the recipe at headers alone before anything large is fetched; gives the bytes of what will be
            written. By default the merge is planned.

    Returns:
        The same recipe, with a commit and a folder for each hub name.

    Raises:
        HubError: If a model cannot be had.
        ModelfuseError: If what the headers say cannot be merged.
    """
    if not recipe.hub_names:
        return recipe
    from modelfuse.planning.hub.download import fetch_models

    return fetch_models(recipe, watch or Watch(), ask, check)


def headers(recipe: Recipe, watch: Watch | None = None) -> AbstractContextManager[Recipe]:
    """Enough to plan a merge: of safetensors that are not in the cache, only the headers are read.

    Returns:
        What gives the same recipe, with a commit and a folder for each hub name, that lasts as long as the context.

    Raises:
        HubError: If a model cannot be had.
        OutputError: If the output exists already.
    """
    if not recipe.hub_names:
        return nullcontext(recipe)
    from modelfuse.planning.hub.download import fetch_headers

    return fetch_headers(recipe, watch or Watch())
