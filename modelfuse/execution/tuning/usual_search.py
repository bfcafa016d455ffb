"""The default search space of a recipe without marks."""

from __future__ import annotations

from dataclasses import replace

from modelfuse.errors import RecipeError
from modelfuse.execution.tuning.search_space import Dimension, Space, dimensions_in, weights_of
from modelfuse.recipe.method_settings import FACTOR
from modelfuse.recipe.recipe import Recipe

#: Ranges of a weight, of a factor on the merged difference, and of such a factor that is a share of the norm.
WEIGHTS, FACTORS, SHARES = (0.0, 1.5), (0.0, 2.0), (0.2, 1.5)


def usual_space(space: Space, recipe: Recipe) -> Space:
    """Add the weights as dimensions, and the factor on the merged difference if only ratios of weights matter.

    Args:
        space: The recipe without dimensions.
        recipe: The same as a recipe.

    Raises:
        RecipeError: If the method has neither, or the recipe is a mergekit configuration.
    """
    if recipe.mergekit is not None:
        raise RecipeError(
            "No number of the configuration is marked to be searched", "Mark numbers, such as weight: {tune: [0, 1]}."
        )
    tree = dict(space.tree)
    parameters = recipe.parameters
    relative = is_relative(recipe)
    if parameters.has_weights and len(recipe.model_path_list) > relative:  # The ratio of one weight is none.
        start = start_weights(recipe)
        tree["weight_list"] = weights_of("weight", len(start), *WEIGHTS, start)
        tree["normalize"] = relative
    if recipe.has_base and (relative or not parameters.has_weights):
        tree[FACTOR] = factor_of(recipe)
    if not any(True for _ in dimensions_in(tree)):
        raise RecipeError(
            f"{parameters.name} has no weights to search",
            "Mark its settings in the recipe, such as alpha: {tune: [0, 1]}.",
        )
    return replace(space, tree=tree)


def is_relative(recipe: Recipe) -> bool:
    """Whether only the ratios of the weights matter, so that a factor is searched in addition."""
    combination = recipe.parameters.declared[1]
    if not recipe.has_base:
        return True
    return combination.matrix is not None or (combination.weights == "relative" and recipe.parameters.normalizes)


def start_weights(recipe: Recipe) -> list[float]:
    """The weights of the recipe, one per model."""
    stated = recipe.parameters.effective()["weight_list"]
    if is_relative(recipe) and isinstance(stated, list):
        return [float(each) for each in stated]
    return [*recipe.weights]


def factor_of(recipe: Recipe) -> Dimension:
    """The factor on the merged difference as a dimension that starts at its value in the recipe."""
    now = recipe.parameters[FACTOR]
    share = isinstance(now, str)
    start = float(str(now).split()[-1])
    low, high = SHARES if share else FACTORS
    return Dimension(FACTOR, min(low, start), max(high, start), start, share=share)
