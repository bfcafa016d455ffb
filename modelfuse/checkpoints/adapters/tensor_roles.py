"""Which of an adapter's tensors belong together, by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.checkpoints.adapters.config import Settings
from modelfuse.checkpoints.tensor_names import group_names
from modelfuse.errors import CheckpointError

#: What PEFT's names begin with.
PEFT_PREFIX = "base_model.model."
#: ``….q_proj.lora_A.weight``; PEFT leaves the adapter's own name out when it saves, other tools do not. Paddle's names
#: end with ``lora_A``.
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<parameter>weight|bias))?"
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save(?:\.(?!weight$|bias$)[^.]+)?\.(?P<parameter>weight|bias)")
_OWN_BASE = re.compile(r"(?P<module>.+)\.(?:base_layer|original_module)\.(?P<parameter>weight|bias)")
#: What is in names of tensors that are no whole weights.
_STRANGE = re.compile(
    r"lora_|hada_|lokr_|oft_|boft_|ia3_|vera_|vblora|token_adapter|_quanter|quant_weight|weight_scale|randlora|hra_u"
)


@dataclass
class Module:
    """The tensors of one adapted layer.

    Attributes:
        name: The layer's name in the model.
        factors: ``A``, ``B``, perhaps ``magnitude`` (DoRA) and ``bias`` (of B).
        embedding: Whether the layer is an embedding.
    """

    name: str
    factors: dict[str, StoredTensor] = field(default_factory=dict)
    embedding: bool = False


@dataclass
class Contents:
    """An adapter's tensors.

    Attributes:
        modules: Adapted layers by name.
        whole: Tensors that replace the base's, by the base's name as the adapter has it.
        copies: Tensors of the base that the adapter has a copy of.
    """

    modules: dict[str, Module] = field(default_factory=dict)
    whole: dict[str, StoredTensor] = field(default_factory=dict)
    copies: dict[str, StoredTensor] = field(default_factory=dict)


def sort_out(weights: Checkpoint, settings: Settings) -> Contents:
    """Sort an adapter's tensors by what they do.

    Raises:
        CheckpointError: If one of a pair is missing, or a tensor is of an unsupported kind.
    """
    contents, strange = Contents(), list[str]()
    for tensor in weights.values():
        name = tensor.name.removeprefix(PEFT_PREFIX)
        if match := _FACTOR.fullmatch(name):
            _add_factor(contents, match, tensor)
        elif match := _SAVED.fullmatch(name):
            contents.whole[f"{match['module']}.{match['parameter']}"] = tensor
        elif match := _OWN_BASE.fullmatch(name):
            trained = match["parameter"] == "bias" and settings.trains_biases
            group = contents.whole if trained else contents.copies
            group[f"{match['module']}.{match['parameter']}"] = tensor
        elif _STRANGE.search(name):
            strange.append(tensor.name)
        else:
            contents.whole[name] = tensor
    if strange:
        raise CheckpointError(
            f"{weights.path} holds tensors of a kind of adapter that is not supported:\n"
            + "\n".join(f"  {group}" for group in group_names(strange)),
            "Supported are LoRA, rsLoRA and DoRA of Linear, Conv and Embedding layers.",
        )
    _check_pairs(weights, contents.modules)
    return contents


def _add_factor(contents: Contents, match: re.Match[str], tensor: StoredTensor) -> None:
    module = contents.modules.setdefault(match["module"], Module(match["module"]))
    part = match["part"].removeprefix("lora_")
    module.embedding |= part.startswith("embedding_")
    short = part.removeprefix("embedding_").removesuffix("_vector")
    module.factors["bias" if match["parameter"] == "bias" else short] = tensor


def _check_pairs(weights: Checkpoint, modules: Mapping[str, Module]) -> None:
    alone = [
        next(iter(module.factors.values())).name for module in modules.values() if not {"A", "B"} <= {*module.factors}
    ]
    if alone:
        raise CheckpointError(
            f"{weights.path}: A or B is missing beside " + ", ".join(group_names(alone)), "Fetch the adapter again."
        )
