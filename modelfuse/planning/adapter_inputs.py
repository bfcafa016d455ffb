"""Inputs that are adapters: checked, opened over the base, and the tensors that they add to it."""

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
    """The inputs that are not adapters, in order, with the base last if there is one.

    Raises:
        RecipeError: If there are adapters but no base, the base is an adapter, or ``merge_with_qdq_base_model`` is
            given and not all models are adapters.
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
            "merge_with_qdq_base_model quantizes the base as in the adapters' training, but not all models are "
            "adapters",
            "Leave it out, or merge the full models in another step.",
        )
    return tuple(path for path in recipe.input_paths if path not in adapters)


def without_adapters(recipe: Recipe) -> Recipe:
    """The recipe with only the full models, and only their layouts if ``input_layout`` has one per input."""
    paths, layouts = full_models(recipe), recipe.input_layout
    if layouts is not None and len(layouts) > 1:
        layouts = tuple(each for path, each in zip(recipe.input_paths, layouts, strict=True) if path in paths)
    models = paths if recipe.base_model_path is None else paths[:-1]
    return recipe.changed(model_path_list=models, input_layout=layouts)


def open_adapters(recipe: Recipe, models: Sequence[Checkpoint], paddle: bool | None) -> tuple[Checkpoint, ...]:
    """Open the adapters over the base.

    Args:
        recipe: The settings.
        models: The full models in the recipe's order, the base last.
        paddle: Whether the base is in Paddle's layout; None if unknown.

    Returns:
        All inputs in the recipe's order.
    """
    strict = recipe.on_nonfinite == "error"
    adapters = [path for path in recipe.model_paths if is_adapter(path)]
    if recipe.merge_with_qdq_base_model:
        from modelfuse.checkpoints.adapters.quantized_base import quantize_base

        models = (*models[:-1], quantize_base(models[-1], adapters, paddle))

    if not adapters:
        return tuple(models)
    from modelfuse.checkpoints.adapters.tied_base import base_for_adapters, settle_adapters

    # In Paddle's layout, a tied head is stored transposed or not; there, embedding and head change together.
    base = models[-1] if paddle else base_for_adapters(models[-1])

    def opened() -> Iterator[Checkpoint]:
        full = iter(models)
        for path in recipe.input_paths:
            adapts = recipe.base_model_path is not None and is_adapter(path)
            yield open_adapter(path, base, paddle=paddle, strict=strict) if adapts else next(full)

    return tuple(opened()) if paddle else settle_adapters(tuple(opened()), models[-1])


def copied_base_tensors(models: Sequence[Checkpoint]) -> Iterator[EqualPair]:
    """Copies of the base's tensors that adapters store; each must equal the base's."""
    for model in models:
        if isinstance(model, Adapter):
            yield from (EqualPair(one, other, model.path, False) for one, other in model.copies)


def with_adapter_additions(
    models: tuple[Checkpoint, ...],
) -> tuple[tuple[Checkpoint, ...], tuple[MissingRule, ...], tuple[str, ...]]:
    """Add the task heads and token rows that adapters have and the base lacks.

    Returns:
        The models with them; rules for heads that only some models have; and the names of matrices of which the base's
        tensor is not used.
    """
    if not any(isinstance(model, Adapter) for model in models):
        return models, (), ()
    from modelfuse.checkpoints.adapters.heads import resized_rows, with_new_heads

    models, heads = with_new_heads(models)
    models, own = resized_rows(models)
    return models, heads, own
