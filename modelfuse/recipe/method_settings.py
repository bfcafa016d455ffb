"""The settings of methods: what was given of them, for all tensors or for some, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from modelfuse.methods.applied import Applied
from modelfuse.methods.registry import COMBINATIONS, MERGE_METHODS, SPARSIFIERS, apply, parameters_of
from modelfuse.recipe.checks import check_method, check_pruning, check_weights
from modelfuse.recipe.schema import Weight, as_json, setting, settings_of

#: What chooses a method.
STEPS = ("merge_method", "merge_type", "sparsify_type")
#: What methods that have weights take.
WEIGHTS = ("weight_list", "normalize")


@dataclass(frozen=True, kw_only=True)
class _Fields:
    merge_method: Literal[*MERGE_METHODS] | None = setting(  # type: ignore[valid-type]
        None, "A usual pair of merge_type and sparsify_type.", "linear if none of the three is given"
    )
    merge_type: Literal["linear", "slerp", "ties"] | None = setting(None, "How models become one.", "linear")
    sparsify_type: Literal["trim", "dare", "magprune"] | None = setting(None, "What is dropped first.", "nothing")
    weight_list: tuple[Weight, ...] | None = setting(None, "One weight a model.", "equal, their sum 1")
    normalize: bool | None = setting(
        None, "Divide weights by their sum, for ties by those that agree.", "true without weight_list, else false"
    )
    slerp_alpha: float = setting(0.5, "slerp: 0 is the first model, 1 the second.", ge=0, le=1)
    slerp_normalize_eps: float = setting(1e-8, "slerp: smaller norms are not divided by.", ge=0)
    slerp_dot_threshold: float = setting(0.9995, "slerp: above this cosine, interpolate straight.", ge=0, le=1)
    ties_elect_type: Literal["sum", "count"] = setting("sum", "ties: elect signs by value or by number.")
    rescale: bool = setting(True, "Make up for what was dropped.")
    reserve_p: float = setting(0.7, "The share of elements to keep (density).", gt=0, le=1)
    epsilon: float = setting(0.14, "magprune: spread of the keeping probability over the ranks.", ge=0)


#: Every setting that a rule may give for some tensors.
METHOD_SETTINGS = settings_of(_Fields)


@dataclass(frozen=True, slots=True)
class MethodSettings:
    """What was given of the settings of methods.

    Attributes:
        given: The settings by name, checked one by one; the others are as by default.
        models: How many models there are.
    """

    given: Mapping[str, object]
    models: int

    def __hash__(self) -> int:
        return hash((*self.given.items(), self.models))

    def __getitem__(self, name: str) -> Any:
        """A setting's value as it is in effect."""
        value = self.given.get(name)
        return METHOD_SETTINGS[name].default if value is None else value

    def overridden(self, own: Mapping[str, object]) -> MethodSettings:
        """The same where some are given otherwise: what is not named there is as here."""
        given = dict(self.given)
        if any(name in own for name in STEPS):
            for name in STEPS:
                given.pop(name, None)
            if own.get("merge_method") is None:
                given.update(zip(("sparsify_type", "merge_type"), self.steps, strict=True))
        given.update(own)
        changed = MethodSettings(given, self.models)
        if not changed.has_weights:
            for name in WEIGHTS:
                if name not in own:
                    given.pop(name, None)
        return changed

    def check(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            RecipeError: Saying which.
        """
        check_method(self["merge_method"], self["merge_type"], self["sparsify_type"])
        sparsify_type, merge_type = self.steps
        check_weights(self.models, merge_type, self["weight_list"], self["normalize"])
        if sparsify_type == "magprune":
            check_pruning(self["reserve_p"], self["epsilon"])

    @property
    def steps(self) -> tuple[str | None, str]:
        """The effective (sparsify_type, merge_type)."""
        if self["merge_method"] is not None:
            return MERGE_METHODS[self["merge_method"]]
        return self["sparsify_type"], self["merge_type"] or "linear"

    @property
    def name(self) -> str:
        """What the method is called: by its merge_method if it was given by it, else by its steps."""
        return self["merge_method"] or " → ".join(step for step in self.steps if step)

    @property
    def has_weights(self) -> bool:
        """Whether the method takes weights."""
        return COMBINATIONS[self.steps[1]].weights != "none"

    @property
    def normalizes(self) -> bool:
        """The effective ``normalize``: absent weights are equal and normalised."""
        return self["weight_list"] is None or bool(self["normalize"])

    def weights(self, models: Sequence[int]) -> tuple[float, ...]:
        """The effective weights of some of the models, by their numbers from 0 on."""
        weights = self._stated_weights(models)
        total = math.fsum(weights)
        return tuple(weight / total for weight in weights) if self.normalizes else weights

    def _stated_weights(self, models: Sequence[int]) -> tuple[float, ...]:
        weights = self["weight_list"] or (1.0,) * self.models
        return tuple(weights[model] for model in models)

    def applied(self, models: Sequence[int], seed: int) -> Applied:
        """All that the mathematics depends on, where some of the models are merged, by their numbers from 0 on."""
        sparsify_type, merge_type = self.steps
        weights = self.weights(models)
        if COMBINATIONS[merge_type].weights == "relative" and self.normalizes:
            # The division cancels their scale, and a third in float32 would tip votes that cancel exactly.
            weights = self._stated_weights(models)
        same = {name: self[name] for name in METHOD_SETTINGS if name not in (*STEPS, *WEIGHTS)}
        sparsifier = SPARSIFIERS[sparsify_type] if sparsify_type else None
        settings = {**same, "normalize": self.normalizes}
        return apply(sparsifier, COMBINATIONS[merge_type], weights, settings, seed=seed, streams=models)

    def effective(self) -> dict[str, object]:
        """Every setting as it takes effect, ready for JSON."""
        settings: dict[str, object] = {name: as_json(self[name]) for name in METHOD_SETTINGS}
        settings["sparsify_type"], settings["merge_type"] = self.steps
        if self.has_weights:
            settings["weight_list"] = list(self._stated_weights(range(self.models)))
            settings["normalize"] = self.normalizes
        return settings

    def used(self) -> dict[str, object]:
        """Those of them that the method takes, and what chooses it."""
        sparsify_type, merge_type = self.steps
        sparsifier = SPARSIFIERS[sparsify_type] if sparsify_type else None
        names = {each.name for each in parameters_of(sparsifier, COMBINATIONS[merge_type])}
        names |= {*STEPS, *(WEIGHTS if self.has_weights else ())}
        return {name: value for name, value in self.effective().items() if name in names}
