"""Keep the intermediate models of a configuration that has several documents."""

from __future__ import annotations

from pathlib import Path

from modelfuse.errors import RecipeError
from modelfuse.execution.run import run_plan
from modelfuse.planning.plan import make_plan
from modelfuse.recipe.recipe import Recipe


def keep_intermediate(recipe: Recipe) -> None:
    """Merge every document but the last into ``intermediate_dir``/name, if the recipe sets ``intermediate_dir``.

    Raises:
        ModelfuseError: As a merge.
    """
    if recipe.intermediate_dir is None or recipe.mergekit is None:
        return
    if not isinstance(recipe.intermediate_dir, Path):
        raise RecipeError(f"intermediate_dir is {recipe.intermediate_dir}, which is not a local folder")
    for document in recipe.configurations.documents[:-1]:
        name = document.name or ""
        folder = recipe.intermediate_dir / name
        changes: dict[str, object] = {"output_path": folder, "mergekit_document": name, "intermediate_dir": None}
        run_plan(make_plan(recipe.changed(**changes)))
