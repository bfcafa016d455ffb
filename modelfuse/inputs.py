"""What a recipe names becomes checkpoints that can be merged tensor by tensor, or an error that says why not."""

from __future__ import annotations

from collections.abc import Mapping

from modelfuse.checkpoints import Checkpoint, open_checkpoint
from modelfuse.errors import CheckpointError
from modelfuse.recipe import Recipe
from modelfuse.relayout import bring_together


def open_inputs(recipe: Recipe) -> tuple[Checkpoint, ...]:
    """Open the models in order, then the base if there is one; headers only.

    Raises:
        CheckpointError: If an input is missing, malformed or quantized.
        MismatchError: If a model's layout cannot be known.
    """
    models = tuple(open_checkpoint(path, recipe.merge_prefix) for path in recipe.input_paths)
    for model in models:
        _refuse_quantized(model)
    return bring_together(models, recipe)


def _refuse_quantized(model: Checkpoint) -> None:
    quantization = model.config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else "unknown"
        raise CheckpointError(
            f"{model.path} is quantized (quant_method {method}): its stored bits cannot be merged",
            "Merge the unquantized models, then quantize the result.",
        )
    for tensor in model.values():
        if tensor.dtype.numpy is None:
            raise CheckpointError(
                f"{model.path}: tensor {tensor.name!r} has the quantized dtype {tensor.dtype.name}: its bits cannot be "
                "merged",
                "Merge the unquantized models, then quantize the result.",
            )
