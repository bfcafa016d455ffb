"""Tensors with a row for each token, and the number of rows."""

from __future__ import annotations

import re
from collections.abc import Mapping

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.checkpoints.tensor_names import EMBEDDINGS, HEADS

#: Names of tensors outside the layers with a row for each token, beside embeddings and heads.
_ALSO = re.compile(r"(?:^|\.)(?:lm_head|embed_out|embed_tokens\w*|predictions(?:\.decoder)?|word_embeddings)\.\w+$")
#: No limit: larger than any vocabulary.
NO_LIMIT = 1 << 24


def embedding_of(model: Checkpoint) -> str | None:
    """The name of the embedding that a head can be tied to."""
    return min((name for name in model if name.endswith(EMBEDDINGS)), key=len, default=None)


def has_rows_of_tokens(name: str) -> bool:
    """Whether a tensor of this name has a row for each token."""
    return name.endswith((*EMBEDDINGS, *HEADS)) or _ALSO.search(name) is not None


def rows_of(model: Checkpoint) -> int | None:
    """The number of rows of a model's embedding, else of its head."""
    name = embedding_of(model) or next((name for name in model if name.endswith(HEADS)), None)
    return None if name is None else model[name].shape[0]


def axis_of_tokens(name: str, tensor: StoredTensor, rows: int | None) -> int | None:
    """The axis along which a tensor has an entry for each token; None if it has none."""
    if not has_rows_of_tokens(name):
        return None
    return next((axis for axis, length in enumerate(tensor.shape[:2]) if length == rows), None)


def limit_of(model: Checkpoint) -> int:
    """The first token id that a model does not have."""
    said, text = model.config.get("vocab_size"), model.config.get("text_config")
    if type(said) is not int and isinstance(text, Mapping):
        said = text.get("vocab_size")
    limits = [each for each in (rows_of(model), said) if type(each) is int]
    return min(limits) if limits else NO_LIMIT
