"""Adapters among the models of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from modelfuse.checkpoints import Checkpoint
from modelfuse.checkpoints.adapters import Adapter, is_adapter, open_adapter
from modelfuse.errors import RecipeError
from modelfuse.planning.matching import EqualPair
from modelfuse.recipe.missing import MissingRule
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import PathOrUrl


def full_models(recipe: Recipe) -> tuple[PathOrUrl, ...]:
    """The inputs that are no adapters, in order, the base last if there is one.

    Raises:
        RecipeError: If there are adapters and no base, or the base is one.
    """
    adapters = [path for path in recipe.model_paths if is_adapter(path)]
    base = recipe.base_path
    if base is not None and is_adapter(base):
        raise RecipeError(f"base_model_path {base} is an adapter", "Name the model that the adapters were trained on.")
    if adapters and base is None:
        raise RecipeError(
            f"{adapters[0]} is an adapter, which changes a base, but base_model_path is not given",
            "Name the model that it was trained on with --base_model_path.",
        )
    if recipe.merge_with_qdq_base_model and len(adapters) < len(recipe.model_path_list):
        raise RecipeError(
            "merge_with_qdq_base_model quantizes the base as adapters saw it, but not all models are adapters",
            "Leave it out, or merge the full models in another step.",
        )
    return tuple(path for path in recipe.input_paths if path not in adapters)


def without_adapters(recipe: Recipe) -> Recipe:
    """The same recipe of the full models only, each with its own layout where one was given for each."""
    paths, layouts = full_models(recipe), recipe.input_layout
    if layouts is not None and len(layouts) > 1:
        layouts = tuple(each for path, each in zip(recipe.input_paths, layouts, strict=True) if path in paths)
    models = paths if recipe.base_model_path is None else paths[:-1]
    return recipe.changed(model_path_list=models, input_layout=layouts)


def with_adapters(recipe: Recipe, models: Sequence[Checkpoint], paddle: bool | None) -> tuple[Checkpoint, ...]:
    """All inputs in the recipe's order: the full models, and the adapters laid over the base, which is the last."""
    strict = recipe.on_nonfinite == "error"
    adapters = [path for path in recipe.model_paths if is_adapter(path)]
    if recipe.merge_with_qdq_base_model:
        from modelfuse.checkpoints.adapters.quantized_base import quantize_base

        models = (*models[:-1], quantize_base(models[-1], adapters, paddle))

    if not adapters:
        return tuple(models)
    from modelfuse.checkpoints.adapters.tied_base import base_for_adapters, settle_adapters

    # Of Paddle's layout, heads are stored in two ways: there, both ends change together.
    base = models[-1] if paddle else base_for_adapters(models[-1])

    def opened() -> Iterator[Checkpoint]:
        full = iter(models)
        for path in recipe.input_paths:
            adapts = recipe.base_model_path is not None and is_adapter(path)
            yield open_adapter(path, base, paddle=paddle, strict=strict) if adapts else next(full)

    return tuple(opened()) if paddle else settle_adapters(tuple(opened()), models[-1])


def copies(models: Sequence[Checkpoint]) -> Iterator[EqualPair]:
    """What adapters have copies of: their base's tensors, which must be equal."""
    for model in models:
        if isinstance(model, Adapter):
            yield from (EqualPair(one, other, model.path, False) for one, other in model.copies)


def with_what_adapters_bring(
    models: tuple[Checkpoint, ...],
) -> tuple[tuple[Checkpoint, ...], tuple[MissingRule, ...], tuple[str, ...]]:
    """Heads of tasks and rows of tokens that the base lacks.

    Returns:
        The models with them; what becomes of heads that only some have; and the matrices that need nothing of the
        base's.
    """
    if not any(isinstance(model, Adapter) for model in models):
        return models, (), ()
    from modelfuse.checkpoints.adapters.heads import resized_rows, with_new_heads

    models, heads = with_new_heads(models)
    models, own = resized_rows(models)
    return models, heads, own
