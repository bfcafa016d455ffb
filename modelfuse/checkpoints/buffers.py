"""Buffers that a model computes from its configuration; old releases of libraries stored them, new ones do not."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from modelfuse.checkpoints import Checkpoint

#: Suffixes of their names: frequencies, their sines and cosines, position ids, and masks.
ENDINGS = (".inv_freq", ".original_inv_freq", ".cos_cached", ".sin_cached", ".embed_positions", ".position_ids",
           ".token_type_ids", ".relative_position_index", ".masked_bias")  # fmt: skip
#: Suffixes of masks, and their number of dimensions; other tensors of these names are biases.
MASKS, MASK_DIMENSIONS = (".attn.bias", ".attention.bias"), 4
STRAY = "computed from config.json, and not alike in every model"


def is_buffer(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is a computed buffer, which is not to be merged.

    >>> is_buffer("h.0.attn.bias", (1, 1, 1024, 1024)), is_buffer("encoder.0.attn.bias", (768,))
    (True, False)
    """
    return f".{name}".endswith((*ENDINGS, *MASKS) if len(shape) == MASK_DIMENSIONS else ENDINGS)


def without_strays(models: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
    """Leave out buffers that differ between the models or are missing in some: loaders compute them."""
    endings, strays = (*ENDINGS, *MASKS), set[str]()
    for name in {name for model in models for name in (*model, *model.aliases) if f".{name}".endswith(endings)}:
        found = [model.find(name) for model in models]
        held = [each for each in found if each is not None]
        alike = len(held) == len(models) and len({(each.dtype, each.shape) for each in held}) == 1
        if not alike and all(is_buffer(name, each.shape) for each in held):
            strays.add(name)
    return tuple(without(model, strays, STRAY) for model in models) if strays else tuple(models)


def without(model: Checkpoint, names: Collection[str], reason: str) -> Checkpoint:
    """A model without some tensors, which are recorded in ``left_out`` with a reason."""
    if not names:
        return model
    aliases = {name: kept for name, kept in model.aliases.items() if name not in names}
    out = set(names) - set(aliases.values())
    left_out = {**model.left_out, **{name: reason for name in (*model, *model.aliases) if name in out}}
    tensors = {name: tensor for name, tensor in model.items() if name not in out}
    return replace(model, tensors=tensors, aliases=aliases, left_out=left_out)
