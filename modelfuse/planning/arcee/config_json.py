"""config.json and generation_config.json as they are true of the output."""

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

#: Numbers of tokens, or lists of such, in config.json and generation_config.json.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "unk_token_id", "sep_token_id",
              "cls_token_id", "mask_token_id", "image_token_id", "video_token_id", "image_token_index",
              "forced_bos_token_id", "forced_eos_token_id", "vision_start_token_id", "vision_end_token_id")  # fmt: skip
TIES, VOCABULARY_SIZE = "tie_word_embeddings", "vocab_size"


def config_of_layers(
    arrangement: Arrangement, donor: OpenModel, config: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """config.json of the layers that the output has, and what it cannot say.

    Args:
        arrangement: Its layers.
        donor: The model whose config.json it is.
        config: The content.
    """
    notes = list[str]()
    for stack in donor.stacks:
        layers = arrangement.layers[stack.module]
        origins = [(model.checkpoint.config, layer) for _, model, layer in layers]
        if [layer for _, layer in origins] != list(range(stack.count)):
            config, more = with_layers(config, stack, origins)
            notes += more
    return config, notes


def config_of_words(
    config: dict[str, Any],
    operations: Sequence[Operation],
    donor: OpenModel,
    vocabulary: Vocabulary | None,
    rows: int | None = None,
) -> dict[str, Any]:
    """The same with what it says of embeddings and heads.

    Args:
        config: The content.
        operations: The output's tensors.
        donor: The model whose config.json it is.
        vocabulary: The output's, if it is not the donor's.
        rows: How many rows embeddings have, if not as many as the vocabulary says or as they had.
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
    """The numbers of tokens as the output's tokenizer has them."""
    if vocabulary is None:
        return config
    number = next(number for number, model in enumerate(vocabulary.models) if model is donor)
    words = {row: token for token, row in vocabulary.vocabularies.tokenizers[number].tokens.items()}

    def translated(value: object) -> object:
        if isinstance(value, list):
            return [translated(each) for each in value]
        word = words.get(value) if type(value) is int else None
        return value if word is None else vocabulary.output.tokens.get(word, value)

    for part in _text_parts(config):
        for key in _TOKEN_IDS:
            if key in part:
                part[key] = translated(part[key])
    return config


def rows_of_output(operations: Sequence[Operation]) -> int | None:
    """How many rows the output's embedding has."""
    return next((each.shape[0] for each in operations if each.name.endswith(EMBEDDINGS)), None)


def dtype_of(configuration: Configuration, operations: Sequence[Operation]) -> str | None:
    """The type that config.json is to name: what all merged tensors have; None if they differ."""
    named = {operation.dtype for operation in operations if operation.action != "copy"}
    return str(next(iter(named))) if len(named) == 1 else configuration.out_dtype or configuration.dtype


def _text_parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """config.json, and what it says of the language model in it."""
    yield config
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), dict):
            yield config[key]
