"""What a recipe means for each tensor of the output: its method, its parameters and its sources."""

from __future__ import annotations

from collections.abc import Sequence

from modelfuse.checkpoints import Checkpoint
from modelfuse.dtypes import OUTPUT_DTYPES
from modelfuse.errors import RecipeError
from modelfuse.planning.operations import Operation, merged
from modelfuse.recipe.recipe import Recipe


def operations_of(recipe: Recipe, models: Sequence[Checkpoint], names: Sequence[str]) -> list[Operation]:
    """How each tensor of a full model is made.

    Args:
        recipe: The settings.
        models: The models in order, then the base if there is one.
        names: The output's tensors.

    Raises:
        RecipeError: If ``unmerged_from`` is none of the models.
    """
    method, has_base = recipe.method, recipe.base_model_path is not None
    preferred = _preferred_input(recipe)
    dtype = OUTPUT_DTYPES[recipe.output_dtype] if recipe.output_dtype else None
    inputs = tuple(range(len(models)))
    found = [(model.tensors, model.aliases) for model in models]
    return [
        merged(
            name,
            tuple([tensors[aliases.get(name, name)] for tensors, aliases in found]),
            inputs,
            method,
            has_base=has_base,
            dtype=dtype,
            preferred=preferred,
        )
        for name in names
    ]


def _preferred_input(recipe: Recipe) -> int | None:
    if recipe.unmerged_from is None:
        return None
    try:
        return recipe.inputs.index(recipe.unmerged_from)
    except ValueError:
        raise RecipeError(
            f"unmerged_from is {recipe.unmerged_from}, which is none of the models", "Name one of the models' paths."
        ) from None
