"""Rules for equivalent tensor names: prefixes and names of parts that differ between programs and loaders.

A *key* is a name normalized by all rules. Two names with the same key are the same tensor to a loader, as long as a
model does not have two tensors with one key.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class NameRule(NamedTuple):
    """One way in which names may differ.

    Attributes:
        what: A short description.
        pattern: The regular expression to replace in a name.
        key: The replacement in the key.
    """

    what: str
    pattern: re.Pattern[str]
    key: str


def _rule(what: str, pattern: str, key: str) -> NameRule:
    return NameRule(what, re.compile(pattern), key)


#: In the order in which they are applied.
RULES = (
    _rule("PEFT's wrapper", r"^base_model\.model\.", ""),
    _rule(
        "wrappers of DDP, FSDP, torch.compile and checkpointing",
        r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.",
        "",
    ),
    _rule("Qwen-Omni's thinker", r"^thinker\.", ""),
    _rule("the model and its language model", r"^(?:model\.|language_model\.)+", ""),
    _rule(
        "a vision tower's own name",
        r"^(vision_tower|image_tower|video_tower|vision_model|visual)\.vision_model\.",
        r"\1.",
    ),
    _rule("LayerNorm's gamma", r"(?i)(norm\d*)\.gamma$", r"\1.weight"),
    _rule("LayerNorm's beta", r"(?i)(norm\d*)\.beta$", r"\1.bias"),
    _rule("weight normalisation", r"\.weight_g$", ".parametrizations.weight.original0"),
    _rule("weight normalisation", r"\.weight_v$", ".parametrizations.weight.original1"),
    _rule("Mixtral's experts", r"\.block_sparse_moe\.(experts|gate)\.", r".mlp.\1."),
    _rule("Mixtral's gate_proj", r"\.experts\.(\d+)\.w1\.", r".experts.\1.gate_proj."),
    _rule("Mixtral's down_proj", r"\.experts\.(\d+)\.w2\.", r".experts.\1.down_proj."),
    _rule("Mixtral's up_proj", r"\.experts\.(\d+)\.w3\.", r".experts.\1.up_proj."),
    _rule("GPT-NeoX's head", r"^embed_out\.", "lm_head."),
    # What vision transformers of transformers are called inside, and under which names it saves them.
    _rule("layers of an encoder", r"(?<![^.])encoder\.layer\.", "layers."),
    _rule("queries", r"\.attention\.(?:attention|self)\.query\.", ".attention.q_proj."),
    _rule("keys", r"\.attention\.(?:attention|self)\.key\.", ".attention.k_proj."),
    _rule("values", r"\.attention\.(?:attention|self)\.value\.", ".attention.v_proj."),
    _rule("what attention gives", r"\.attention\.output\.dense\.", ".attention.o_proj."),
    _rule("the wide layer", r"\.intermediate\.dense\.", ".mlp.fc1."),
    _rule("the layer back", r"(?<!\.attention)\.output\.dense\.", ".mlp.fc2."),
    _rule("Swin's table", r"\.(?:self|relative_position_bias)\.(relative_position_bias_table)$", r".\1"),
)
#: Parts of a model other than its language model: tensors of different parts are never matched.
PARTS = re.compile(
    r"(?<![^.])(?:\w*(?:vision|visual|image|video|audio|speech|sound|projector|aligner|connector)\w*|vae|unet|"
    r"text_encoder\w*)(?![^.])"
)


def key_of(name: str) -> str:
    """A name normalized by all rules.

    >>> key_of("model.language_model.layers.0.norm.weight"), key_of("language_model.model.layers.0.norm.weight")
    ('layers.0.norm.weight', 'layers.0.norm.weight')
    >>> key_of("module.bert.encoder.LayerNorm.gamma")
    'bert.encoder.LayerNorm.weight'
    """
    for rule in RULES:
        name = rule.pattern.sub(rule.key, name)
    return name


def by_key(names: Iterable[str]) -> dict[str, str]:
    """A model's names by their keys; ambiguous keys are left out."""
    names = tuple(names)
    counts = Counter(map(key_of, names))
    return {key: name for name in names if counts[key := key_of(name)] == 1}


def part_of(name: str) -> frozenset[str]:
    """The words of a name that determine its part of the model; empty for the language model."""
    return frozenset(PARTS.findall(name))


def told(renamed: Mapping[str, str]) -> list[str]:
    """Describe renamed tensors in a few lines, without the common suffix of both names.

    >>> told({"model.layers.0.q": "layers.0.q", "model.layers.1.q": "layers.1.q"})
    ['model.… is … in the output (2 tensors)']
    """
    groups = Counter(_heads(one.split("."), other.split(".")) for one, other in renamed.items() if one != other)
    return [
        f"{one} is {other} in the output ({count} tensor{'s' * (count > 1)})" for (one, other), count in groups.items()
    ]


def _heads(one: Sequence[str], other: Sequence[str]) -> tuple[str, str]:
    """Both names without their common suffix, with stars for numbers."""
    end = 0
    while end < min(len(one), len(other)) and one[-1 - end] == other[-1 - end]:
        end += 1
    heads = (".".join("*" if part.isdigit() else part for part in each[: len(each) - end]) for each in (one, other))
    tail = "…" if end else ""
    return tuple(f"{head}.{tail}" if head and tail else head or tail for head in heads)  # type: ignore[return-value]
