"""Facts from the files beside a model's weights: its configuration, its tokenizer, an adapter's target modules."""

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
from modelfuse.planning.side_file_differences import FolderFiles
from modelfuse.storage import PathOrUrl

#: Displayed names of config.json's settings, and their keys in different architectures; the first present one counts.
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
#: Special tokens by their keys in tokenizer_config.json.
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
#: The most characters of a text from an untrusted file that are displayed.
LONGEST = 120


class TokenizerFacts(Struct, frozen=True):
    """A tokenizer.

    Attributes:
        kind: The type of its model, such as ``BPE``; this and the numbers are null if its files cannot be parsed.
        tokens: Number of tokens.
        added: Number of added tokens among them.
        rows: Number of rows that an embedding needs for them.
        special: The special tokens (``bos_token``, …).
        chat_template: Whether there is a chat template.
    """

    kind: str | None
    tokens: int | None
    added: int | None
    rows: int | None
    special: Mapping[str, str]
    chat_template: bool


class Target(Struct, frozen=True):
    """Layers that an adapter changes in the same way.

    Attributes:
        module: The layers' name, with a star for numbers.
        kind: ``lora``, ``hada`` (LoHa), ``lokr``, ``ia3`` or ``tokens``.
        layers: Number of layers.
        rank: The rank of the factors; null if there are none.
        scale: The factor of their product; null if there is none.
        dora: Whether there are DoRA magnitudes.
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
        type: The type of PEFT: ``LORA``, ``LOHA``, …
        base: The base model that its configuration names.
        task: The task type that its configuration names.
        rank: The default rank.
        alpha: The default alpha.
        targets: The layers that it changes.
        whole: Names of the tensors that it replaces as a whole, grouped.
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
    """The main settings of config.json, by their displayed names.

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


def tokenizer_facts(served: FolderFiles) -> TokenizerFacts | None:
    """Facts about the tokenizer in a folder; None if there is none."""
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
    """The properties that adapted layers must share to be listed as one :class:`Target`."""

    module: str
    kind: str
    rank: int | None
    scale: float | None
    dora: bool


def adapter_facts(path: PathOrUrl, weights: Checkpoint) -> AdapterFacts | None:
    """The weights that an adapter changes; None for a model.

    Args:
        path: The folder, or the file with the weights.
        weights: Its tensors.

    Raises:
        CheckpointError: If the adapter is of an unsupported kind, or incomplete.
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
