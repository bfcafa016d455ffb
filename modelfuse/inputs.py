"""What a recipe names becomes checkpoints that can be merged tensor by tensor, or an error that says why not."""

from __future__ import annotations

from modelfuse.checkpoints import Checkpoint, open_checkpoint
from modelfuse.matching import refuse_mixed_layouts
from modelfuse.quantized import dequantized
from modelfuse.recipe import Recipe


def open_inputs(recipe: Recipe) -> tuple[Checkpoint, ...]:
    """Open the models in order, then the base if there is one; headers only.

    Raises:
        CheckpointError: If an input is missing, malformed, or quantized in a way that is not understood.
        MismatchError: If the models' layouts differ.
    """
    models = tuple(dequantized(open_checkpoint(path, recipe.merge_prefix)) for path in recipe.input_paths)
    refuse_mixed_layouts(models)
    return models
