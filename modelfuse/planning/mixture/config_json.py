"""config.json of a mixture of experts, from the base's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelfuse.planning.mixture.kinds import MixtureKind

#: Defaults of dense models' classes in transformers for settings that config.json may leave out. Those of mixtures
#: have other defaults.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2,
              "sliding_window": None},
    "mistral": {"max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2,
                "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "num_key_value_heads": 32, "head_dim": 128},
}  # fmt: skip
#: Settings that only dense models have.
_DENSE = ("mlp_bias", "pretraining_tp", "auto_map", "_name_or_path")
THETA, ROPE = "rope_theta", "rope_parameters"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a mixture.

    Attributes:
        experts: The number of routed experts.
        per_token: The number of experts per token.
        inner: The intermediate size of an expert.
        shared: The intermediate size of the shared expert, if there is one.
    """

    experts: int
    per_token: int
    inner: int
    shared: int | None


def config_of_mixture(base: Mapping[str, object], kind: MixtureKind, sizes: Sizes) -> tuple[dict[str, Any], list[str]]:
    """Make config.json.

    Args:
        base: The base's config.json.
        kind: The kind of mixture.
        sizes: Its sizes.

    Returns:
        The content, and notes on settings of the base that it cannot express.
    """
    base_type, notes = str(base.get("model_type")), list[str]()
    config = {name: value for name, value in base.items() if name not in _DENSE}
    for name, value in _DEFAULTS[base_type].items():
        config.setdefault(name, value)
    if ROPE not in config:
        config.setdefault(THETA, 10000.0)
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = config.get("num_attention_heads")
    config.setdefault("hidden_act", "silu")
    config |= {"model_type": kind.model_type, "architectures": [kind.class_name], **kind.settings}
    config |= {"num_experts_per_tok": sizes.per_token, "intermediate_size": sizes.inner}
    if kind.name == "mixtral":
        config |= {"num_local_experts": sizes.experts}
        config.pop("attention_bias", None)
    elif kind.name == "deepseek":
        config |= {"n_routed_experts": sizes.experts, "moe_intermediate_size": sizes.inner,
                   "n_shared_experts": None if sizes.shared is None else sizes.shared // sizes.inner}  # fmt: skip
        if config.pop("sliding_window", None):
            notes.append("The base has a sliding window, which DeepSeek models lack: the output uses full attention.")
    else:
        config |= {"num_experts": sizes.experts, "moe_intermediate_size": sizes.inner}
        if sizes.shared is not None:
            config["shared_expert_intermediate_size"] = sizes.shared
        if base_type not in ("qwen2", "qwen3"):
            slides, layers = bool(config.get("sliding_window")), config.get("num_hidden_layers")
            config |= {"use_sliding_window": slides, "max_window_layers": 0 if slides else layers}
            if slides and isinstance(layers, int):
                config["layer_types"] = ["sliding_attention"] * layers
    return config, notes
