"""Names of embeddings and output heads, and grouping of many names for messages."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: Modules that turn tokens, or their positions, into vectors; the first is the usual one of a decoder.
TOKEN_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "shared")
POSITION_EMBEDDINGS = ("wpe",)
EMBEDDINGS = tuple(f"{module}.weight" for module in TOKEN_EMBEDDINGS)
#: Output heads that share the input embedding's values where config.json ties them; the first is the usual one.
TIED_HEADS = ("lm_head", "embed_out", "cls.predictions.decoder")
HEADS = tuple(f"{module}.weight" for module in TIED_HEADS)
#: What other libraries call them.
OTHER_HEADS = ("output_projection", "output_layer", "vocab_projector", "lm_loss")
#: The most groups of names that an error lists.
MOST_GROUPS = 20


def pattern(name: str) -> str:
    """A tensor's name with a star for every number between dots.

    >>> pattern("model.layers.12.mlp.up_proj.weight")
    'model.layers.*.mlp.up_proj.weight'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def group_names(names: Iterable[str]) -> list[str]:
    """Group names that differ only in numbers, one line per group.

    >>> group_names(["layers.0.q", "layers.1.q", "norm"])
    ['layers.*.q (2 tensors)', 'norm']
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(pattern(name), []).append(name)
    lines = [members[0] if len(members) == 1 else f"{shape} ({len(members)} tensors)"
             for shape, members in groups.items()]  # fmt: skip
    if len(lines) > MOST_GROUPS:
        lines = [*lines[:MOST_GROUPS], f"and {len(lines) - MOST_GROUPS} more"]
    return lines
