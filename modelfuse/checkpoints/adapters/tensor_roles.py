"""Group an adapter's tensors by layer and role, by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.checkpoints.adapters.config import SUPPORTED, AdapterConfig
from modelfuse.checkpoints.tensor_names import group_names
from modelfuse.errors import CheckpointError

#: The prefix of PEFT's names.
PEFT_PREFIX = "base_model.model."
#: ``….q_proj.lora_A.weight``; PEFT leaves the adapter's own name out when it saves, other tools do not. Paddle's names
#: end with ``lora_A``.
_FACTOR = re.compile(
    r"(?P<module>.+?)(?P<wrapped>(?:\.base_layer)*)"
    r"(?:\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)"
    r"|ia3_l|(?:token_adapter\.)?trainable_tokens_delta)|_(?P<own>lora_[AB]))"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<parameter>weight|bias))?"
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save(?:\.(?!weight$|bias$)[^.]+)?\.(?P<parameter>weight|bias)")
_OWN_BASE = re.compile(
    r"(?P<module>.+?)(?:\.token_adapter)?\.(?:base_layer|original_module)\.(?P<parameter>weight|bias)"
)
#: Parts of names of tensors that are not whole weights.
_STRANGE = re.compile(
    r"lora_|hada_|lokr_|oft_|boft_|ia3_|vera_|vblora|token_adapter|_quanter|quant_weight|weight_scale|randlora|hra_u"
)
#: Parameters of fused experts in the order in which a model declares them, which is that of PEFT's wrappers.
_EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
#: The required parts of each kind of layer: one of several sets, by a part that only this kind has.
_NEEDED: Mapping[str, tuple[frozenset[str], ...]] = {
    "hada": (frozenset(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),),
    "lokr": tuple(
        frozenset(first + second)
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
    "ia3": (frozenset(("ia3_l",)),),
    "tokens": (frozenset(("tokens",)),),
    "lora": (frozenset(("A", "B")),),
}


@dataclass
class AdaptedLayer:
    """The tensors of one adapted layer.

    Attributes:
        name: The layer's name in the model; of a single parameter that is adapted, the parameter's.
        factors: ``A``, ``B``, perhaps ``magnitude`` (DoRA) and ``bias`` (of B); of other kinds of adapters what PEFT
            calls them, ``tokens`` for rows of an embedding.
        embedding: Whether the layer is an embedding.
        parameter: Whether it is a single parameter, such as all experts' weights in one tensor.
    """

    name: str
    factors: dict[str, StoredTensor] = field(default_factory=dict)
    embedding: bool = False
    parameter: bool = False

    @property
    def kind(self) -> str:
        """``lora``, ``hada`` (LoHa), ``lokr``, ``ia3`` or ``tokens``."""
        return next((kind for kind in _NEEDED for part in self.factors if part.startswith(kind)), "lora")

    @property
    def weight(self) -> str:
        """The name of the adapted weight."""
        return self.name if self.parameter else f"{self.name}.weight"


@dataclass
class AdapterContents:
    """An adapter's tensors.

    Attributes:
        modules: Adapted layers by name.
        whole: Tensors that replace the base's, by the base's name as the adapter has it.
        copies: Copies of tensors of the base.
    """

    modules: dict[str, AdaptedLayer] = field(default_factory=dict)
    whole: dict[str, StoredTensor] = field(default_factory=dict)
    copies: dict[str, StoredTensor] = field(default_factory=dict)


def sort_out(weights: Checkpoint, settings: AdapterConfig, has: Callable[[str], bool]) -> AdapterContents:
    """Sort an adapter's tensors by role.

    Args:
        weights: The adapter's tensors.
        settings: Its configuration.
        has: Whether the base has a tensor of a name.

    Raises:
        CheckpointError: If one of a pair is missing, or a tensor is of an unsupported kind.
    """
    contents, strange = AdapterContents(), list[str]()
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
            f"{SUPPORTED} They may be on Linear, Conv and Embedding layers, and LoRA on experts.",
        )
    _check_kinds(weights, contents.modules, settings)
    _check_pairs(weights, contents.modules)
    contents.modules = _by_parameter(weights, contents.modules, settings, has)
    return contents


def _add_factor(contents: AdapterContents, match: re.Match[str], tensor: StoredTensor) -> None:
    name = f"{match['module']}{match['wrapped']}"
    module = contents.modules.setdefault(name, AdaptedLayer(name, parameter=match["own"] is not None))
    part = (match["own"] or match["part"]).removeprefix("lora_")
    module.embedding |= part.startswith("embedding_")
    short = part.removeprefix("embedding_").removesuffix("_vector")
    short = "tokens" if short.endswith("trainable_tokens_delta") else short
    module.factors["bias" if match["parameter"] == "bias" else short] = tensor


def _check_kinds(weights: Checkpoint, modules: Mapping[str, AdaptedLayer], settings: AdapterConfig) -> None:
    other = [
        next(iter(each.factors.values())).name for each in modules.values() if each.kind not in settings.adapts.modules
    ]
    if other:
        raise CheckpointError(
            f"{weights.path} holds tensors of another kind of adapter than {settings.adapts.name}, which "
            f"{settings.file.name} says:\n" + "\n".join(f"  {group}" for group in group_names(other)),
            "Fetch the adapter again.",
        )
    if settings.tokens and not any(each.kind == "tokens" for each in modules.values()):
        raise CheckpointError(
            f"{settings.file} names trained rows of an embedding (trainable tokens), but {weights.path} has none",
            "Fetch the adapter again.",
        )


def _check_pairs(weights: Checkpoint, modules: Mapping[str, AdaptedLayer]) -> None:
    alone = [
        next(iter(module.factors.values())).name
        for module in modules.values()
        if not any(needed <= {*module.factors} for needed in _NEEDED[module.kind])
    ]
    if alone:
        missing = "A or B is" if all(".lora_" in name for name in alone) else "other parts are"
        raise CheckpointError(
            f"{weights.path}: {missing} missing beside " + ", ".join(group_names(alone)), "Fetch the adapter again."
        )


def _by_parameter(
    weights: Checkpoint, modules: Mapping[str, AdaptedLayer], settings: AdapterConfig, has: Callable[[str], bool]
) -> dict[str, AdaptedLayer]:
    """The layers by name, with single parameters separated.

    PEFT wraps a layer once for each of its adapted parameters, the first one innermost, and names the factors by the
    wrappers: ``experts.base_layer.lora_A`` and ``experts.lora_A``.
    """
    wrappers: dict[str, list[AdaptedLayer]] = {}
    for name, module in modules.items():
        wrappers.setdefault(re.sub(r"(\.base_layer)+$", "", name), []).append(module)
    named: dict[str, AdaptedLayer] = {}
    for name, found in wrappers.items():
        leaves = _parameters_of(name, settings)
        if len(found) == 1 and found[0].name == name and (not leaves or has(f"{name}.weight")):
            named[name] = found[0]
            continue
        if len(leaves) != len(found):
            raise CheckpointError(
                f"{weights.path} has {len(found)} pairs of factors for {name}, but target_parameters of "
                f"{settings.file.name} names {', '.join(leaves) or 'none of its parameters'}"
            )
        for leaf, module in zip(leaves, sorted(found, key=lambda each: -len(each.name)), strict=True):
            module.name, module.parameter = f"{name}.{leaf}", True
            named[module.name] = module
    return named


def _parameters_of(name: str, settings: AdapterConfig) -> list[str]:
    """The adapted parameters of a layer by the configuration, in the model's order."""
    leaves = {target.rpartition(".")[2] for target in settings.parameters}
    fits = [leaf for leaf in leaves if any(f".{name}.{leaf}".endswith(f".{target}") for target in settings.parameters)]
    order = {leaf: number for number, leaf in enumerate(_EXPERT_PARAMETERS)}
    return sorted(fits, key=lambda leaf: (order.get(leaf, len(order)), leaf))
