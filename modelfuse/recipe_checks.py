"""The checks of a recipe that concern several settings at once, and how its errors read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelfuse.errors import MissingExtraError, RecipeError
from modelfuse.methods import MERGE_METHODS

if TYPE_CHECKING:
    from modelfuse.recipe import Recipe


def check_recipe(recipe: Recipe) -> None:
    """Refuse settings that contradict each other.

    Raises:
        RecipeError: Naming the settings and the way out.
        MissingExtraError: If one needs what is not installed.
    """
    _check_models(recipe)
    _check_method(recipe)
    _check_weights(recipe)
    _check_pruning(recipe)
    for name in recipe.copy_file_list:
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise RecipeError(f"copy_file_list names {name!r}, which is not inside the model's folder")


def explain(errors: Iterable[Any]) -> str:
    """What is wrong with the settings' types and ranges, a line each, from pydantic's errors."""
    lines = []
    for error in errors:
        name = error["loc"][0] if error["loc"] else "the recipe"
        if error["type"] == "missing":
            lines.append(f"{name} is not given")
            continue
        reason = str(error["msg"]).removeprefix("Value error, ")
        lines.append(f"{name} is {error['input']!r}: {reason[0].lower() + reason[1:]}")
    return "\n".join(lines)


def _check_models(recipe: Recipe) -> None:
    if len(recipe.model_path_list) < 2:
        raise RecipeError(
            f"model_path_list names {len(recipe.model_path_list)} model; a merge needs at least two",
            "Give two or more paths after --model_path_list.",
        )
    if recipe.tensor_type == "np" and recipe.device != "cpu":
        raise RecipeError(
            f"tensor_type np computes on the CPU, so device {recipe.device} cannot be used",
            "Use --device cpu, or --tensor_type pt or pd for a GPU.",
        )
    if recipe.tensor_type != "np":
        raise MissingExtraError(
            f"tensor_type {recipe.tensor_type} is not built yet in this version",
            "Use --tensor_type np --device cpu: same methods, at the speed of a copy.",
        )


def _check_method(recipe: Recipe) -> None:
    if recipe.merge_method is None:
        return
    sparsify_type, merge_type = MERGE_METHODS[recipe.merge_method]
    for name, given, implied in (
        ("merge_type", recipe.merge_type, merge_type),
        ("sparsify_type", recipe.sparsify_type, sparsify_type),
    ):
        if given is not None and given != implied:
            raise RecipeError(
                f"merge_method {recipe.merge_method} means {name} {implied or 'none'}, but {given} is given",
                "Leave merge_method out to combine merge_type and sparsify_type freely.",
            )


def _check_weights(recipe: Recipe) -> None:
    models = len(recipe.model_path_list)
    if recipe.steps[1] == "slerp":
        if models != 2:
            raise RecipeError(f"slerp merges exactly two models, {models} are given", "Use linear or ties for more.")
        if recipe.weight_list is not None:
            raise RecipeError("slerp takes no weight_list", "Use --slerp_alpha: 0 is the first model, 1 the second.")
        return
    if recipe.weight_list is None:
        return
    if len(recipe.weight_list) != models:
        raise RecipeError(
            f"weight_list has {len(recipe.weight_list)} weights for {models} models", "Give one weight a model."
        )
    if recipe.normalize and abs(math.fsum(recipe.weight_list)) < 1e-8:
        raise RecipeError("weight_list sums to zero, so it cannot be normalized", "Use --no_normalize.")


def _check_pruning(recipe: Recipe) -> None:
    if recipe.steps[0] != "magprune":
        return
    low, high = recipe.reserve_p - recipe.epsilon / 2, recipe.reserve_p + recipe.epsilon / 2
    if low <= 0 or high >= 1:
        raise RecipeError(
            f"magprune keeps elements with probabilities from reserve_p − epsilon/2 = {low:g} to "
            f"reserve_p + epsilon/2 = {high:g}; both must lie between 0 and 1",
            "Choose a reserve_p nearer to 0.5 or a smaller epsilon.",
        )
