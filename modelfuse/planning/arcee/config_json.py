"""The output's config.json and generation_config.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from modelfuse.checkpoints.layer_config import with_layers
from modelfuse.checkpoints.tensor_names import EMBEDDINGS, HEADS
from modelfuse.planning.arcee.models import OpenModel
from modelfuse.planning.arcee.tensors import Arrangement
from modelfuse.planning.arcee.vocabulary import Vocabulary
from modelfuse.planning.operations import Operation
from modelfuse.recipe.arcee.configuration import Configuration

#: Settings of config.json and generation_config.json that are token ids or lists of token ids.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "unk_token_id", "sep_token_id",
              "cls_token_id", "mask_token_id", "image_token_id", "video_token_id", "image_token_index",
              "forced_bos_token_id", "forced_eos_token_id", "vision_start_token_id", "vision_end_token_id")  # fmt: skip
TIES, VOCABULARY_SIZE = "tie_word_embeddings", "vocab_size"


def config_of_layers(
    arrangement: Arrangement, donor: OpenModel, config: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Adjust config.json to the output's layers.

    Args:
        arrangement: The output's layers.
        donor: The model that config.json is from.
        config: The content.

    Returns:
        The new content, and notes on settings that it cannot express.
    """
    notes = list[str]()
    for stack in donor.stacks:
        layers = arrangement.layers[stack.module]
        origins = [(model.checkpoint.config, layer) for _, model, layer in layers]
        if [layer for _, layer in origins] != list(range(stack.count)):
            config, more = with_layers(config, stack, origins)
            notes += more
    return config, notes


def config_of_vocabulary(
    config: dict[str, Any],
    operations: Sequence[Operation],
    donor: OpenModel,
    vocabulary: Vocabulary | None,
    rows: int | None = None,
) -> dict[str, Any]:
    """Adjust the settings of config.json about embeddings and heads.

    Args:
        config: The content, which is changed.
        operations: The output's operations.
        donor: The model that config.json is from.
        vocabulary: The output's vocabulary, if it is not the donor's.
        rows: The number of rows of the embedding, if it differs from the donor's and there is no ``vocabulary``.
    """
    rows = vocabulary.rows if vocabulary is not None else rows
    has_head = any(operation.name.endswith(HEADS) for operation in operations)
    for part in _text_parts(config):
        if has_head and part.get(TIES) is True:
            part[TIES] = False
        if rows is not None and type(part.get(VOCABULARY_SIZE)) is int:
            part[VOCABULARY_SIZE] = rows
    if has_head and donor.is_tied:
        config[TIES] = False
    elif not has_head and not donor.is_tied and any(name.endswith(HEADS) for name in donor.checkpoint):
        config[TIES] = True
    return with_token_ids(config, donor, vocabulary)


def with_token_ids(config: dict[str, Any], donor: OpenModel, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """Translate token ids from the donor's vocabulary to the output's."""
    if vocabulary is None:
        return config
    number = next(number for number, model in enumerate(vocabulary.models) if model is donor)
    tokens = {row: token for token, row in vocabulary.vocabularies.tokenizers[number].tokens.items()}

    def translated(value: object) -> object:
        if isinstance(value, list):
            return [translated(each) for each in value]
        token = tokens.get(value) if type(value) is int else None
        return value if token is None else vocabulary.output.tokens.get(token, value)

    for part in _text_parts(config):
        for key in _TOKEN_IDS:
            if key in part:
                part[key] = translated(part[key])
    return config


def rows_of_output(operations: Sequence[Operation]) -> int | None:
    """The number of rows of the output's embedding; None if there is none."""
    return next((each.shape[0] for each in operations if each.name.endswith(EMBEDDINGS)), None)


def dtype_of(configuration: Configuration, operations: Sequence[Operation]) -> str | None:
    """The dtype for config.json: that of all merged tensors, else the configuration's; None if neither is known."""
    named = {operation.dtype for operation in operations if operation.action != "copy"}
    return str(next(iter(named))) if len(named) == 1 else configuration.out_dtype or configuration.dtype


def _text_parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """config.json, and its nested configuration of the language model."""
    yield config
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), dict):
            yield config[key]
