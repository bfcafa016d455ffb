"""Find contradictions between the config.json files of several models.

A difference is *fatal* if it changes the meaning of the weights, so that merging them is meaningless. Others are
reported, except for settings that no forward pass depends on, and sizes, which the tensors' shapes show.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

Config = Mapping[str, object]


class ConfigDifference(NamedTuple):
    """A setting that two configurations give different values.

    Attributes:
        key: Its name; of a part, with the part's.
        one: The first one's value.
        other: The other one's.
        fatal: Whether merging such models is meaningless.
    """

    key: str
    one: object
    other: object
    fatal: bool


#: Settings that the meaning of the weights depends on.
FATAL = re.compile(
    r"model_type|num_attention_heads|n_heads?|num_heads|num_key_value_heads|n_kv_heads|multi_query|head_dim|kv_channels"
    r"|(q|kv)_lora_rank|qk_(rope|nope)_head_dim|v_head_dim"
    r"|hidden_act(ivation)?|activation(_function)?|hidden_activation|feed_forward_proj|dense_act_fn"
    r"|num_experts_per_tok|num_(local_)?experts|n_routed_experts|moe_top_?k|scoring_func|topk_method|norm_topk_prob"
    r"|routed_scaling_factor|(attention|residual|embedding|logits)_(multiplier|scaling)|logit_scale|scale_(depth|emb)"
    r"|query_pre_attn_scalar|(attn|final)_logit_softcapping|position_embedding_type|alibi|parallel_(attn|residual)"
    r"|use_parallel_residual|new_decoder_architecture|partial_rotary_factor|rotary_pct|rope_interleave"
    r"|do_layer_norm_before|norm_type|use_qk_norm|qk_layernorm|state_size|conv_kernel|time_step_rank|ssm_state_size"
    r"|patch_size|spatial_merge_size|temporal_patch_size|_class_name|prediction_type|is_decoder|is_encoder_decoder"
)
#: Epsilons of norms: fatal if they differ by orders of magnitude.
EPSILON = re.compile(r"(rms|layer)?_?norm(alization)?_eps(ilon)?|layer_norm_epsilon|eps")
MOST_TIMES = 50.0
#: Settings that no forward pass depends on, or that are compared elsewhere.
IGNORED = re.compile(
    r"transformers_version|_.*|architectures|auto_map|use_cache|\w*dropout\w*|\w*drop_path\w*|\w*_drop|\w*_pdrop"
    r"|layerdrop|initializer_\w+|init_std|output_\w+|return_dict\w*|id2label|label2id|num_labels|problem_type"
    r"|task_specific_params|gradient_checkpointing|pretraining_tp|attn_implementation|(bos|eos|pad|sep|cls|unk)_token_id"
    r"|finetuning_task|classifier_\w+|tie_word_embeddings|source|paddleformers_version|use_flash_attention\w*"
    r"|fuse_\w+|max_length|min_length|do_sample|temperature|top_[kp]|num_beams|torchscript|is_composition|unsloth\w*"
    r"|router_aux_loss_coef|aux_loss_\w+|seq_aux|chunk_size_feed_forward|mlp_bias_init|name_or_path|router_jitter_noise"
)
#: Sizes: the shapes show which tensors differ.
SIZES = re.compile(
    r"hidden_size|d_model|n_embd|num_hidden_layers|num_layers|n_layers?|intermediate_size|n_inner|d_ff|ffn_dim|vocab_size"
    r"|moe_intermediate_size|shared_expert_intermediate_size|num_nextn_predict_layers|max_window_layers"
    r"|first_k_dense_replace|decoder_sparse_step|mlp_only_layers|no_rope_layers|layer_types|depth"
)
#: Settings that older and newer releases of libraries name differently.
SAME = {"torch_dtype": "dtype", "rope_parameters": "rope", "rope_scaling": "rope", "rope_theta": "rope",
        "text_model_config": "text_config", "llm_config": "text_config", "language_config": "text_config"}  # fmt: skip
PARTS = ("text_config", "vision_config", "audio_config", "thinker_config", "encoder", "decoder")
MOST_CHARACTERS = 80


def config_differences(one: Config, other: Config) -> Iterator[ConfigDifference]:
    """Contradictions between two configurations; a setting that only one of them has is the other's default.

    >>> [each.key for each in config_differences({"head_dim": 8, "rope_theta": 1e4}, {"head_dim": 4})]
    ['head_dim']
    """
    if not one or not other:
        return
    yield from _of_classes(one, other)
    if ("text_config" in one) != ("text_config" in other):  # A text model beside a model that has one as a part.
        yield from _of_parts("text_config.", _part(one), _part(other), {"model_type"})
        return
    yield from _of_parts("", one, other, set())


def _of_classes(one: Config, other: Config) -> Iterator[ConfigDifference]:
    """Different architectures; within one family, as with another head, the tensors show the differences."""
    names = [each.get("architectures") for each in (one, other)]
    first = [str(each[0]) for each in names if isinstance(each, list) and each]
    families = {re.sub(r"(For[A-Z]\w*|LMHead\w*|Text)?(Model)?$", "", name) for name in first}
    types = {str(each.get("model_type")) for each in (one, other)}
    if len(first) == 2 and len(families) > 1 and len(types) == 1:
        yield ConfigDifference("architectures", first[0], first[1], True)


def _part(config: Config) -> Config:
    part = config.get("text_config")
    return part if isinstance(part, Mapping) else config


def _of_parts(prefix: str, one: Config, other: Config, but: set[str]) -> Iterator[ConfigDifference]:
    first, second = _plain(one), _plain(other)
    for key in (each for each in first if each in second and each not in but):
        mine, theirs = first[key], second[key]
        if key in PARTS and isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            yield from _of_parts(f"{prefix}{key}.", mine, theirs, set())
        elif IGNORED.fullmatch(key) or SIZES.fullmatch(key) or _alike(mine, theirs):
            continue
        elif EPSILON.fullmatch(key):
            yield ConfigDifference(f"{prefix}{key}", mine, theirs, _far_apart(mine, theirs))
        else:
            yield ConfigDifference(f"{prefix}{key}", mine, theirs, FATAL.fullmatch(key) is not None)


def _plain(config: Config) -> dict[str, object]:
    """The settings under unique names; rotary position settings as one."""
    found: dict[str, object] = {}
    for key, value in config.items():
        if SAME.get(key) != "rope" and value is not None:
            found[SAME.get(key, key)] = value
    rope = _rope(config)
    if rope is not None:
        found["rope"] = rope
    heads, width = found.get("num_attention_heads"), found.get("hidden_size")
    if "head_dim" not in found and type(heads) is int and type(width) is int and heads and width % heads == 0:
        found["head_dim"] = width // heads
    return found


def _rope(config: Config) -> dict[str, object] | None:
    """The rotary position settings; old releases store the base separately from the scaling."""
    if not any(SAME.get(key) == "rope" for key in config):
        return None
    found: dict[str, object] = {"theta": config.get("rope_theta")} if "rope_theta" in config else {}
    for key in ("rope_scaling", "rope_parameters"):
        part = config.get(key)
        if isinstance(part, Mapping):
            found |= {"theta" if name == "rope_theta" else name: value for name, value in part.items()}
    kind = found.pop("rope_type", found.pop("type", "default"))
    found.pop("type", None)
    return {"type": kind, **{name: value for name, value in found.items() if value is not None}}


def _alike(one: object, other: object) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return all(_alike(one[key], other[key]) for key in one.keys() & other.keys())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) != len(other) or all(map(_alike, one, other))
    return one == other


def _far_apart(one: object, other: object) -> bool:
    numbers = [each for each in (one, other) if isinstance(each, int | float) and each > 0]
    return len(numbers) < 2 or abs(math.log(numbers[0] / numbers[1])) > math.log(MOST_TIMES)


def shown(value: object) -> str:
    """A setting as JSON, shortened to fit a line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"
