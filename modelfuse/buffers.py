"""Tensors that a model computes from its configuration: old releases of libraries stored them, new ones do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from modelfuse.checkpoints import Checkpoint

#: How their names end: frequencies and numbers of positions, and the value that masks attention.
ENDINGS = (".inv_freq", ".position_ids", ".masked_bias")
#: The same of masks, which are tensors of one matrix; anything else of that name is a bias.
MASKS, MASK_DIMENSIONS = (".attn.bias", ".attention.bias"), 4
STRAY = "computed from config.json, and not in every model"


def is_buffer(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is computed, so that merging it means nothing.

    >>> is_buffer("h.0.attn.bias", (1, 1, 1024, 1024)), is_buffer("encoder.0.attn.bias", (768,))
    (True, False)
    """
    return f".{name}".endswith(ENDINGS) or (f".{name}".endswith(MASKS) and len(shape) == MASK_DIMENSIONS)


def without_strays(models: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
    """Leave out the buffers that not all models hold: whoever loads those without computes them."""
    held = [{*model, *model.aliases} for model in models]
    everywhere = set.intersection(*held)
    return tuple(_without(model, own - everywhere) for model, own in zip(models, held, strict=True))


def _without(model: Checkpoint, names: set[str]) -> Checkpoint:
    if not (strays := {name for name in names if is_buffer(name, model[model.aliases.get(name, name)].shape)}):
        return model
    aliases = {name: kept for name, kept in model.aliases.items() if name not in strays}
    strays -= set(aliases.values())
    tensors = {name: tensor for name, tensor in model.items() if name not in strays}
    left_out = {**model.left_out, **{name: STRAY for name in (*model, *model.aliases) if name in strays}}
    return replace(model, tensors=tensors, aliases=aliases, left_out=left_out)
