"""Parse mergekit-moe's configurations: experts from several models with the attention of one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from modelfuse.errors import RecipeError
from modelfuse.recipe.arcee.grammar import read_dtype, read_list, read_text
from modelfuse.recipe.arcee.notes import Notes
from modelfuse.recipe.arcee.references import Reference, References
from modelfuse.recipe.checks import nearest, shown

GateMode = Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"]
GATE_MODES: tuple[GateMode, ...] = get_args(GateMode)
#: Gate modes without prompts, and those that run the base.
RANDOM, HIDDEN = ("random", "uniform_random"), ("hidden", "hidden_avg", "hidden_last")
TOP_KEYS = ("base_model", "experts", "shared_experts", "gate_mode", "dtype", "experts_per_token", "architecture")
EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
#: The most experts.
MOST_EXPERTS = 1000


@dataclass(frozen=True, slots=True)
class Expert:
    """A model whose MLPs become one expert of each layer.

    Attributes:
        model: The model.
        prompts: Texts that are routed to it.
        negative: Texts that are not routed to it.
        noise: The standard deviation of noise that is added to its weights.
        scale: The factor of its output.
    """

    model: Reference
    prompts: tuple[str, ...]
    negative: tuple[str, ...]
    noise: float
    scale: float


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture of experts built from dense models.

    Attributes:
        base_model: The model of everything except the MLPs.
        experts: The routed experts.
        shared: The shared experts, which every token uses.
        gate_mode: How the router's weights are made.
        dtype: The output type; None: the inputs'.
        per_token: The number of routed experts per token.
        architecture: The architecture of the output; None: the first that fits.
        notes: Notes on settings without effect.
    """

    base_model: Reference
    experts: tuple[Expert, ...]
    shared: tuple[Expert, ...]
    gate_mode: GateMode
    dtype: str | None
    per_token: int
    architecture: str | None
    notes: tuple[str, ...]

    @property
    def merge_method(self) -> str:
        """Its name in reports."""
        return "moe"

    @property
    def references(self) -> tuple[Reference, ...]:
        """All distinct models, the base first."""
        return tuple(dict.fromkeys((self.base_model, *(each.model for each in (*self.experts, *self.shared)))))


def read_mixture(content: Mapping[object, object], references: References) -> Mixture:
    """Parse a configuration of mergekit-moe.

    Args:
        content: The content of the YAML document.
        references: Reads references to models.

    Raises:
        RecipeError: If anything in it is invalid.
    """
    notes = Notes()
    notes.unknown(content, TOP_KEYS, "")
    if content.get("base_model") is None:
        raise RecipeError("base_model is not given", "Name the model that attention and embeddings are taken from.")
    base = references.read(content["base_model"], "base_model", notes)
    mode = content.get("gate_mode", "hidden")
    if mode not in GATE_MODES:
        hint = nearest(mode, GATE_MODES) if isinstance(mode, str) else ""
        raise RecipeError(f"gate_mode is {shown(mode)}", f"Give one of {', '.join(GATE_MODES)}. {hint}".strip())
    experts, shared = (_experts(content, key, references, notes) for key in ("experts", "shared_experts"))
    if not experts:
        raise RecipeError("experts is empty", "Name two or more, each with source_model:.")
    count = content.get("experts_per_token", 2)
    if type(count) is not int or not 1 <= count <= len(experts):
        raise RecipeError(
            f"experts_per_token is {shown(count)}, but there are {len(experts)} experts",
            f"Give a number from 1 to {len(experts)}; without one, it is 2.",
        )
    if mode not in RANDOM and (bare := [number for number, each in enumerate(experts) if not each.prompts]):
        raise RecipeError(
            f"experts[{bare[0]}] has no positive_prompts, of which gate_mode {mode} makes the router",
            "Give texts that are to be routed to it, or gate_mode: random.",
        )
    return Mixture(
        base, experts, shared, mode, read_dtype(content, "dtype"), count, read_text(content, "architecture"),
        tuple(notes.lines),
    )  # fmt: skip


def _experts(content: Mapping[object, object], key: str, references: References, notes: Notes) -> tuple[Expert, ...]:
    if content.get(key) in (None, []):
        return ()
    listed = read_list(content, key, key)
    if len(listed) > MOST_EXPERTS:
        raise RecipeError(f"{key} has {len(listed):,} entries", f"At most {MOST_EXPERTS:,} are taken.")
    return tuple(_expert(each, f"{key}[{number}]", references, notes) for number, each in enumerate(listed))


def _expert(content: object, where: str, references: References, notes: Notes) -> Expert:
    if not isinstance(content, Mapping) or content.get("source_model") is None:
        raise RecipeError(f"{where} names no model", "Write source_model: NAME in each entry.")
    notes.unknown(content, EXPERT_KEYS, where)
    model = references.read(content["source_model"], f"{where}.source_model", notes)
    noise, scale = _number(content, "noise_scale", 0.0, where), _number(content, "residual_scale", 1.0, where)
    if noise < 0:
        raise RecipeError(f"{where}.noise_scale is {noise:g}", "Give a number from 0 on.")
    return Expert(
        model, _prompts(content, "positive_prompts", where), _prompts(content, "negative_prompts", where), noise, scale
    )


def _number(content: Mapping[object, object], key: str, default: float, where: str) -> float:
    value = content.get(key)
    if value is None:
        return default
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= 1e6:
        raise RecipeError(f"{where}.{key} is {shown(value)}", "Give a number.")
    return number


def _prompts(content: Mapping[object, object], key: str, where: str) -> tuple[str, ...]:
    value = content.get(key)
    prompts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(prompts, list) or not all(isinstance(each, str) for each in prompts):
        raise RecipeError(f"{where}.{key} is {shown(value)}", "Give a list of texts.")
    return tuple(prompts)
