"""Open a recipe's inputs as checkpoints with the same names and layout."""

from __future__ import annotations

from modelfuse.checkpoints import Checkpoint, open_checkpoint
from modelfuse.checkpoints.buffers import without_strays
from modelfuse.checkpoints.layouts.convert import bring_together
from modelfuse.checkpoints.quantization import dequantized
from modelfuse.checkpoints.same_names import with_same_names
from modelfuse.checkpoints.ties import settle
from modelfuse.planning.adapter_inputs import full_models, open_adapters, without_adapters
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage.concurrent import each_of


def open_inputs(recipe: Recipe) -> tuple[Checkpoint, ...]:
    """Open the models in order, then the base if there is one; headers only.

    Raises:
        CheckpointError: If an input is missing, malformed, or quantized by an unsupported method.
        MismatchError: If a model's layout cannot be detected, or an adapter does not fit the base.
        RecipeError: If there are adapters but no base.
    """
    models = tuple(each_of(lambda path: dequantized(open_checkpoint(path, recipe.merge_prefix)), full_models(recipe)))
    models = bring_together(models, without_adapters(recipe))
    models = with_same_names(models, -1 if recipe.has_base else 0)
    models = without_strays(models)
    models = settle(models)
    layout = recipe.output_layout or models[-1].layout
    return open_adapters(recipe, models, None if layout is None else layout == "paddle")
