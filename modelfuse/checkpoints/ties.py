"""Output heads tied to the input embedding: which models tie them, and how to tie and untie them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from modelfuse.checkpoints.tensor_names import EMBEDDINGS, HEADS
from modelfuse.checkpoints.tensors import Checkpoint, StoredTensor

#: Keys of the language model's configuration in a multimodal model's config.json.
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
#: The setting of config.json.
TIES = "tie_word_embeddings"
#: Model types whose class in transformers ties by default; config.json omits defaults.
TIED_CLASSES = frozenset((
    "albert", "bart", "bert", "big_bird", "biogpt", "blenderbot", "bloom", "camembert", "cohere", "cohere2", "ctrl",
    "deberta", "deberta-v2", "distilbert", "electra", "ernie4_5", "ernie4_5_moe", "esm", "falcon", "falcon_mamba",
    "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gpt2",
    "gpt_bigcode", "gpt_neo", "gpt_neox_japanese", "jetmoe", "lfm2", "lfm2_moe", "longformer", "longt5", "m2m_100",
    "mamba", "marian", "mbart", "minicpm3", "mobilebert", "modernbert", "modernbert-decoder", "mpnet", "mpt", "mt5",
    "nomic_bert", "openai-gpt", "opt", "paligemma", "pegasus", "recurrent_gemma", "roberta", "shieldgemma2",
    "smollm3", "starcoder2", "switch_transformers", "t5", "t5gemma", "umt5", "vaultgemma", "whisper", "xglm",
    "xlm-roberta", "xlm-roberta-xl", "xlnet", "zamba", "zamba2",
))  # fmt: skip
#: Elements that are compared at a time.
PIECE = 1 << 20


class TiedPair(NamedTuple):
    """The names of a model's input embedding and of its output head."""

    embedding: str
    head: str


def says_tied(config: Mapping[str, object]) -> bool | None:
    """Whether a config.json ties the output head to the input embedding; None if it does not say.

    A multimodal model may say it at the top level, for its language model, or both. Loaders differ in which they use,
    so if both disagree the answer is no: all loaders accept a model with both tensors. If neither says it, the default
    is the class's, and shared storage shows which one it was.

    >>> says_tied({"text_config": {"tie_word_embeddings": True}})
    True
    """
    parts = [config, *(config[key] for key in TEXT_CONFIGS if key in config)]
    said = [part.get(TIES) for part in parts if isinstance(part, Mapping)]
    return False if False in said else True if True in said else None


def is_tied(model: Checkpoint) -> bool:
    """Whether loaders tie a model's head to its embedding.

    If config.json does not say it, the class's default applies; for an unknown class, a model is tied if its files have
    no head, or one that shares the embedding's storage.
    """
    said = says_tied(model.config)
    if said is not None:
        return said
    if is_tied_class(model.config):
        return True
    return any(alias.endswith(HEADS) and kept.endswith(EMBEDDINGS) for alias, kept in model.aliases.items())


def is_tied_class(config: Mapping[str, object]) -> bool:
    """Whether a model is of a class that ties unless config.json says otherwise."""
    kind = config.get("model_type")
    return isinstance(kind, str) and kind in TIED_CLASSES


def pair_of(model: Checkpoint) -> TiedPair | None:
    """The names of a model's embedding and head (the usual name, if it has no head); None if they are ambiguous."""
    embeddings = [name for name in model if name.endswith(EMBEDDINGS)]
    heads = [name for name in (*model, *model.aliases) if name.endswith(HEADS)]
    if len(embeddings) != 1 or len(heads) > 1 or model.config.get("is_encoder_decoder"):
        return None
    return TiedPair(embeddings[0], heads[0] if heads else _usual_head(embeddings[0]))


def _usual_head(embedding: str) -> str:
    """The usual name of the head for an embedding's name.

    >>> _usual_head("model.embed_tokens.weight"), _usual_head("language_model.model.embed_tokens.weight")
    ('lm_head.weight', 'language_model.lm_head.weight')
    """
    part = re.match(r"(language_model\.)model\.", embedding)
    return f"{part[1] if part else ''}{HEADS[1] if embedding.endswith('embed_in.weight') else HEADS[0]}"


def has_head(model: Checkpoint) -> bool:
    """Whether a model has an output head at all, as far as config.json names its class."""
    named = model.config.get("architectures")
    first = str(named[0]) if isinstance(named, list) and named else ""
    return not re.search(r"(Model|For\w*(Classification|QuestionAnswering|MultipleChoice))(?<!LMHeadModel)$", first)


def apart(model: Checkpoint, pair: TiedPair) -> Checkpoint:
    """The model with the head as a tensor of its own; a copy of the embedding's, if it has none."""
    tensors = dict(model.tensors)
    if pair.head not in tensors:
        tensors[pair.head] = replace(tensors[pair.embedding], name=pair.head)
    aliases = {alias: kept for alias, kept in model.aliases.items() if alias != pair.head}
    return replace(_saying(model, False), tensors=tensors, aliases=aliases)


def together(model: Checkpoint) -> Checkpoint:
    """The model with a config.json that ties its head, which equals the embedding."""
    return _saying(model, True)


def _saying(model: Checkpoint, ties: bool) -> Checkpoint:
    config: dict[str, object] = {**model.config, TIES: ties}
    for key in TEXT_CONFIGS:
        part = config.get(key)
        if isinstance(part, Mapping) and TIES in part:
            config[key] = {**part, TIES: ties}
    if says_tied(model.config) is ties:
        return model
    return replace(model, config=config, config_changes={**model.config_changes, TIES: ties})


def are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same bytes; reads them up to the first difference."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one == replace(other, name=one.name):
        return True
    size = one.dtype.nbytes(min(PIECE, one.size))
    buffers = [memoryview(bytearray(size)) for _ in range(2)]
    with one.open() as first, other.open() as second:
        for start in range(0, one.size, PIECE):
            count = one.dtype.nbytes(min(PIECE, one.size - start))
            for reader, buffer in zip((first, second), buffers, strict=True):
                reader(start, buffer[:count])
            if buffers[0][:count] != buffers[1][:count]:
                return False
    return True


def settle(models: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
    """Tie the heads of all models or of none: untied if any model's head differs from its embedding."""
    pairs = [pair_of(model) for model in models]
    tied = [is_tied(model) for model in models]
    if None in pairs or len({pair.embedding for pair in pairs if pair is not None}) > 1 or all(tied) or not any(tied):
        return tuple(models)
    known = [pair for pair in pairs if pair is not None]
    heads = {pair.head for pair, model in zip(known, models, strict=True) if pair.head in (*model, *model.aliases)}
    if len(heads) != 1:
        return tuple(models)
    pair = TiedPair(known[0].embedding, heads.pop())
    own = [model for model in models if pair.head in model.tensors]
    if all(are_equal(model.tensors[pair.head], model.tensors[pair.embedding]) for model in own):
        return tuple(map(together, models))
    return tuple(apart(model, pair) for model in models)
