"""What lies beside a model's weights: its configuration, its tokenizer, an adapter's targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from msgspec import Struct

from modelfuse.checkpoints import Checkpoint
from modelfuse.checkpoints.adapters.adapter import config_of
from modelfuse.checkpoints.adapters.config import AdapterConfig, read_settings
from modelfuse.checkpoints.adapters.tensor_roles import AdaptedLayer, sort_out
from modelfuse.checkpoints.json_files import read_json
from modelfuse.checkpoints.tensor_names import group_names, pattern
from modelfuse.checkpoints.ties import TEXT_CONFIGS
from modelfuse.planning.served_differences import Served
from modelfuse.storage import PathOrUrl

#: What config.json's settings are called, and what they are shown as; the first that is there counts.
SETTINGS: Mapping[str, Sequence[str]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "width": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "key-value heads": ("num_key_value_heads",),
    "head width": ("head_dim",),
    "MLP width": ("intermediate_size", "n_inner", "d_ff", "ffn_dim"),
    "experts": ("n_routed_experts", "num_local_experts", "num_experts"),
    "experts a token": ("num_experts_per_tok", "moe_top_k"),
    "vocabulary": ("vocab_size",),
    "positions": ("max_position_embeddings", "n_positions"),
    "rope theta": ("rope_theta",),
    "activation": ("hidden_act", "hidden_activation", "activation_function"),
    "declared dtype": ("dtype", "torch_dtype"),
}
#: Tokens with a special meaning, as tokenizer_config.json names them.
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
#: The longest text of strangers that is repeated.
LONGEST = 120


class TokenizerFacts(Struct, frozen=True):
    """A tokenizer.

    Attributes:
        kind: The type of its model, such as ``BPE``; null where its files are not understood.
        tokens: How many there are.
        added: How many of them were added.
        rows: How many rows an embedding needs for them.
        special: The tokens that begin, end and fill a text.
        chat_template: Whether there is one.
    """

    kind: str | None
    tokens: int | None
    added: int | None
    rows: int | None
    special: Mapping[str, str]
    chat_template: bool


class Target(Struct, frozen=True):
    """What an adapter changes, alike in several layers.

    Attributes:
        module: The layer's name, with a star for numbers.
        kind: ``lora``, ``hada`` (LoHa), ``lokr``, ``ia3`` or ``tokens``.
        layers: How many there are.
        rank: Of the factors; null where there are none.
        scale: What their product is multiplied by.
        dora: Whether it has magnitudes.
    """

    module: str
    kind: str
    layers: int
    rank: int | None
    scale: float | None
    dora: bool


class AdapterFacts(Struct, frozen=True):
    """An adapter.

    Attributes:
        format: ``peft`` or ``paddle``.
        type: As PEFT calls it: ``LORA``, ``LOHA``, ….
        base: The model that it says it was trained on.
        task: What it was trained for.
        rank: Of most layers.
        alpha: Of most layers.
        targets: What it changes.
        whole: Tensors that it brings whole, alike ones as one.
    """

    format: str
    type: str
    base: str | None
    task: str | None
    rank: int
    alpha: float
    targets: Sequence[Target]
    whole: Sequence[str]


def config_facts(config: Mapping[str, object]) -> dict[str, str | int | float | bool]:
    """What config.json says of a model, in few words and numbers.

    >>> config_facts({"model_type": "llama", "num_hidden_layers": 2, "vocab_size": None})
    {'model type': 'llama', 'layers': 2}
    """
    facts: dict[str, str | int | float | bool] = {}
    named = config.get("architectures")
    if isinstance(named, list) and named:
        facts["architecture"] = _short(named[0])
    if isinstance(config.get("model_type"), str):
        facts["model type"] = _short(config["model_type"])
    text = next((config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), Mapping)), {})
    both = {**config, **(text if isinstance(text, Mapping) else {})}
    for name, keys in SETTINGS.items():
        value = next((both[key] for key in keys if isinstance(both.get(key), int | float | str)), None)
        if value is not None:
            facts[name] = _short(value)
    return facts


def _short(value: object) -> str | int | float | bool:
    return value if isinstance(value, int | float) else str(value)[:LONGEST]


def tokenizer_facts(served: Served) -> TokenizerFacts | None:
    """What is known of the tokenizer in a folder, None if there is none."""
    if not served.has_tokenizer:
        return None
    found = served.tokenizer
    settings = served.json("tokenizer_config.json")
    special: dict[str, str] = {}
    for name in SPECIAL:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(value, str):
            special[name] = value[:LONGEST]
    template = bool(served.template)
    if found is None:
        return TokenizerFacts(None, None, None, None, special, template)
    return TokenizerFacts(found.kind, len(found.tokens), len(found.added), found.rows, special, template)


class _Kind(NamedTuple):
    """What adapted layers share that are told as one."""

    module: str
    kind: str
    rank: int | None
    scale: float | None
    dora: bool


def adapter_facts(path: PathOrUrl, weights: Checkpoint) -> AdapterFacts | None:
    """What an adapter changes, None if it is none.

    Args:
        path: Its folder, or the file with its weights.
        weights: Its tensors.

    Raises:
        CheckpointError: If it is of a kind that is not supported, or incomplete.
    """
    file = config_of(path)
    if file is None:
        return None
    settings, content = read_settings(file), read_json(file)
    contents = sort_out(weights, settings, lambda _: False)
    kinds = Counter(_kind_of(each, settings) for each in contents.modules.values())
    return AdapterFacts(
        settings.kind,
        settings.adapts.name,
        _text(content.get("base_model_name_or_path")),
        _text(settings.task),
        settings.rank,
        settings.alpha,
        [Target(each.module, each.kind, count, each.rank, each.scale, each.dora) for each, count in kinds.items()],
        [*_whole(contents.whole)],
    )


def _whole(tensors: Mapping[str, object]) -> Iterator[str]:
    yield from group_names(tensors)


def _text(value: object) -> str | None:
    return value[:LONGEST] if isinstance(value, str) and value else None


def _kind_of(module: AdaptedLayer, settings: AdapterConfig) -> _Kind:
    has_rank = module.kind not in ("ia3", "tokens")
    return _Kind(
        pattern(module.name),
        module.kind,
        settings.rank_of(module.name) if has_rank else None,
        settings.scale_of(module.name) if has_rank else None,
        "magnitude" in module.factors,
    )
