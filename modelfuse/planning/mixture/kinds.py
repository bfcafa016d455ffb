"""The supported kinds of mixtures: names of their tensors, and settings of their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modelfuse.errors import MismatchError, RecipeError
from modelfuse.recipe.arcee.mixture import Mixture
from modelfuse.recipe.checks import nearest, shown

#: The names of the projections of a dense model's MLP.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_LIKE_LLAMA = ("llama", "mistral")
_WEIGHTS = tuple(f"self_attn.{each}_proj.weight" for each in "qkvo")
_BIASES = tuple(f"self_attn.{each}_proj.bias" for each in "qkvo")
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


@dataclass(frozen=True)
class MixtureKind:
    """A kind of mixture of experts.

    Attributes:
        name: The value of ``architecture`` in a configuration.
        aliases: Other values of ``architecture``.
        model_type: The model_type in config.json.
        class_name: The class in transformers.
        bases: The model_types of bases that it can have.
        layer: Names of the tensors that a layer may have beside its MLP.
        block: The module of a layer that contains the experts.
        projections: Names of an expert's projections that differ from a dense model's.
        shared: The module of the shared expert; empty if this kind has none.
        shared_gate: The module that scales the shared expert's output; empty if there is none.
        needs_shared: Whether a shared expert is required.
        biases: Attention biases that are required; zeros if the base has none.
        settings: Settings of config.json that all models of this kind have.
    """

    name: str
    aliases: tuple[str, ...]
    model_type: str
    class_name: str
    bases: tuple[str, ...]
    layer: tuple[str, ...]
    block: str = "mlp"
    projections: Mapping[str, str] = field(default_factory=dict)
    shared: str = ""
    shared_gate: str = ""
    needs_shared: bool = False
    biases: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def projection(self, name: str) -> str:
        """The name of an expert's projection, given a dense model's name."""
        return self.projections.get(name, name)


_DEEPSEEK_CODE = "deepseek-ai/deepseek-moe-16b-base--"
KINDS = (
    MixtureKind(
        "mixtral", (), "mixtral", "MixtralForCausalLM", _LIKE_LLAMA, (*_WEIGHTS, *_NORMS), "block_sparse_moe",
        {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
        settings={"output_router_logits": False, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0},
    ),
    MixtureKind(
        "deepseek", ("deepseek_moe",), "deepseek", "DeepseekForCausalLM", _LIKE_LLAMA,
        (*_WEIGHTS, *_BIASES, *_NORMS), shared="shared_experts",
        settings={"first_k_dense_replace": 0, "moe_layer_freq": 1, "scoring_func": "softmax", "norm_topk_prob": True,
                  "aux_loss_alpha": 0.001, "seq_aux": True,
                  "auto_map": {"AutoConfig": f"{_DEEPSEEK_CODE}configuration_deepseek.DeepseekConfig",
                               "AutoModel": f"{_DEEPSEEK_CODE}modeling_deepseek.DeepseekModel",
                               "AutoModelForCausalLM": f"{_DEEPSEEK_CODE}modeling_deepseek.DeepseekForCausalLM"}},
    ),
    MixtureKind(
        "qwen2_moe", ("qwen", "qwen2", "qwen_moe"), "qwen2_moe", "Qwen2MoeForCausalLM", (*_LIKE_LLAMA, "qwen2"),
        (*_WEIGHTS, *_BIASES[:3], *_NORMS), shared="shared_expert", shared_gate="shared_expert_gate",
        needs_shared=True, biases=_BIASES[:3],
        settings={"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
                  "output_router_logits": False, "router_aux_loss_coef": 0.001},
    ),
    MixtureKind(
        "qwen3_moe", ("qwen3",), "qwen3_moe", "Qwen3MoeForCausalLM", ("qwen3",),
        (*_WEIGHTS, *_BIASES, *_NORMS, "self_attn.q_norm.weight", "self_attn.k_norm.weight"),
        settings={"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
                  "output_router_logits": False, "router_aux_loss_coef": 0.001},
    ),
)  # fmt: skip


def mixture_kind(mixture: Mixture, base_type: object) -> MixtureKind:
    """The kind of a configuration's ``architecture``, else the first kind that fits.

    Args:
        mixture: The mergekit-moe configuration.
        base_type: The base's model_type.

    Raises:
        MismatchError: If no kind fits.
        RecipeError: If ``architecture`` is unknown.
    """
    kinds: tuple[MixtureKind, ...] = KINDS
    if mixture.architecture is not None:
        wanted = mixture.architecture.lower().replace("-", "_").replace(" ", "_")
        kinds = tuple(each for each in KINDS if wanted in (each.name, *each.aliases))
        if not kinds:
            names = [each.name for each in KINDS]
            raise RecipeError(
                f"architecture is {shown(mixture.architecture)}",
                f"Give one of {', '.join(names)}. {nearest(wanted, names)}".strip(),
            )
    reasons = {each.name: _reason(each, mixture, base_type) for each in kinds}
    for each in kinds:
        if reasons[each.name] is None:
            return each
    lines = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
    raise MismatchError(
        f"No kind of mixture of experts fits the configuration and a base with the model_type {base_type}:\n{lines}",
        "Change shared_experts, architecture or the base.",
    )


def _reason(kind: MixtureKind, mixture: Mixture, base_type: object) -> str | None:
    """Why a kind does not fit; None if it does."""
    if base_type not in kind.bases:
        return f"its base must be a {' or '.join(kind.bases)} model"
    if mixture.shared and not kind.shared:
        return "it cannot have a shared expert"
    if len(mixture.shared) > 1:
        return "it can have only one shared expert"
    if kind.needs_shared and not mixture.shared:
        return "it needs one entry in shared_experts"
    gated = any(each.prompts for each in mixture.shared)
    if gated and not kind.shared_gate:
        return "its shared expert has no gate, so positive_prompts cannot be used"
    return None
