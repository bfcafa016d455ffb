"""The rows of embeddings and heads that models have in common, by their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from modelfuse.checkpoints import Checkpoint
from modelfuse.checkpoints.vocabulary.rearranged_rows import rearranged
from modelfuse.checkpoints.vocabulary.row_maps import RowMap
from modelfuse.checkpoints.vocabulary.token_rows import axis_of_tokens, has_rows_of_tokens, rows_of
from modelfuse.checkpoints.vocabulary.tokenizers import read_tokenizer
from modelfuse.errors import CheckpointError, MissingExtraError
from modelfuse.storage import folder_of


class CommonRows(NamedTuple):
    """Models whose embeddings and heads are cut to the rows of common tokens.

    Attributes:
        models: The models; those tensors have the rows of tokens that all models have, in the base's order.
        rows: For these tensors, the number of rows, and their full shape in the base.
        reasons: Why other tensors cannot be compared so, by name.
    """

    models: tuple[Checkpoint, ...]
    rows: dict[str, tuple[int, tuple[int, ...]]]
    reasons: dict[str, str]


def with_common_rows(models: Sequence[Checkpoint], names: Sequence[str]) -> CommonRows:
    """Cut tensors with different numbers of rows to the rows of tokens that all models have.

    Rows are matched by token, never by position alone: another tokenizer may have another token there.

    Args:
        models: The models, then the base.
        names: Tensors whose shapes differ.
    """
    chosen = [name for name in names if has_rows_of_tokens(name)]
    tokens: list[Mapping[str, int]] = []
    try:
        tokens = [_tokens(model, models[-1]) for model in models] if chosen else []
    except (CheckpointError, MissingExtraError) as error:
        return CommonRows(tuple(models), {}, dict.fromkeys(chosen, error.message))
    changed = [dict(model.tensors) for model in models]
    rows, reasons = dict[str, tuple[int, tuple[int, ...]]](), dict[str, str]()
    for name in chosen:
        own = [model.aliases.get(name, name) for model in models]
        tensors = [model.resolve(name) for model in models]
        axes = [axis_of_tokens(name, tensor, rows_of(model)) for tensor, model in zip(tensors, models, strict=True)]
        axis = axes[-1]
        widths = {tensor.shape[:each] + tensor.shape[each + 1 :] for tensor, each in zip(tensors, axes, strict=True)
                  if each is not None}  # fmt: skip
        if axis is None or len({*axes}) > 1 or len(widths) > 1:
            continue
        maps = _row_maps(tokens, [tensor.shape[axis] for tensor in tensors])
        if not len(maps[0]):
            reasons[name] = "the models have no token in common"
            continue
        rows[name] = len(maps[0]), tensors[-1].shape
        for number, tensor in enumerate(tensors):
            changed[number][own[number]] = rearranged(number, {number: tensor}, maps[number], axis)
    found = (replace(model, tensors=tensors) for model, tensors in zip(models, changed, strict=True))
    return CommonRows(tuple(found), rows, reasons)


def _row_maps(tokens: Sequence[Mapping[str, int]], lengths: Sequence[int]) -> list[RowMap]:
    """For each model, its rows of the tokens that all models have rows of."""
    base = sorted((number, token) for token, number in tokens[-1].items())
    common = [
        token
        for _, token in base
        if all(own.get(token, length) < length for own, length in zip(tokens, lengths, strict=True))
    ]
    return [
        RowMap(np.full(len(common), number), np.array([own[token] for token in common], np.int64))
        for number, own in enumerate(tokens)
    ]


def _tokens(model: Checkpoint, base: Checkpoint) -> Mapping[str, int]:
    """The ids of a model's tokens; one without a tokenizer that has the base's rows has its tokens."""
    try:
        return read_tokenizer(folder_of(model.path)).tokens
    except CheckpointError:
        if model is base or rows_of(model) != rows_of(base):
            raise
        return read_tokenizer(folder_of(base.path)).tokens
