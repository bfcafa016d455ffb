"""What a recipe names becomes checkpoints that can be merged tensor by tensor, or an error that says why not."""

from __future__ import annotations

from modelfuse.checkpoints import Checkpoint, open_checkpoint
from modelfuse.quantized import dequantized
from modelfuse.recipe import Recipe
from modelfuse.relayout import bring_together


def open_inputs(recipe: Recipe) -> tuple[Checkpoint, ...]:
    """Open the models in order, then the base if there is one; headers only.

    Raises:
        CheckpointError: If an input is missing, malformed, or quantized in a way that is not understood.
        MismatchError: If a model's layout cannot be known.
    """
    models = tuple(dequantized(open_checkpoint(path, recipe.merge_prefix)) for path in recipe.input_paths)
    return bring_together(models, recipe)
