"""The settings of methods, for all tensors or for those of a rule, and the method that they select."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct

from modelfuse.errors import RecipeError
from modelfuse.methods.applied import Applied
from modelfuse.methods.registry import (
    COMBINATIONS,
    METHODS,
    PARAMETER_ALIASES,
    PARAMETERS,
    SPARSIFIERS,
    apply,
    parameters_of,
)
from modelfuse.methods.spec import Combination, Parameter, Sparsifier
from modelfuse.recipe.checks import check_method, check_models_of, check_step, check_weights
from modelfuse.recipe.schema import Factor, PerModel, Setting, Weight, as_json, setting

#: The settings that select a method.
STEPS = ("merge_method", "merge_type", "sparsify_type")
#: The settings of weights.
WEIGHTS = ("weight_list", "normalize")


#: The setting of the factor on the merged difference.
FACTOR = "lambda"
#: The default for whole-matrix methods: a good factor is not known in advance, but this share suits all of them.
USUAL_NORM = "norm 0.6"


def _settings() -> dict[str, Setting]:
    """The settings that select a method, the weights, and the settings that methods declare."""

    def by_method(parameter: Parameter) -> str:
        """The default in words, if methods have different ones."""
        words = {name: str(each.defaults[parameter.name]).lower() for name, each in METHODS.items()
                 if each.defaults.get(parameter.name, parameter.default) != parameter.default}  # fmt: skip
        usual = str(parameter.default).lower()
        return "; ".join([usual, *(f"{word} for {name}" for name, word in words.items())]) if words else ""

    def declared(parameter: Parameter) -> Setting:
        kind: Any = Literal[*parameter.choices] if parameter.choices else type(parameter.default)
        made = setting(parameter.default, parameter.description, by_method(parameter), **parameter.bounds)
        read = Setting(PerModel[kind] if parameter.per_model else kind, made)
        read.aliases = parameter.aliases
        return read

    found = {
        "merge_method": Setting(Literal[*METHODS] | None, setting(
            None, "A name for a merge_type, with or without a sparsify_type.", "linear if none of the three is given")),
        "merge_type": Setting(Literal[*COMBINATIONS] | None, setting(
            None, "How the models' tensors are combined.", "linear")),
        "sparsify_type": Setting(Literal[*SPARSIFIERS] | None, setting(
            None, "How each model's elements are sparsified first.", "nothing")),
        "weight_list": Setting(
            tuple[Weight, ...] | None, setting(None, "One weight per model.", "equal, their sum 1")),
        "normalize": Setting(bool | None, setting(
            None, "Divide by the sum of the weights; ties: of the weights whose signs agree.",
            "true without weight_list, else false")),
        FACTOR: Setting(Factor | None, setting(
            None, "With a base: what the merged difference is multiplied by; 'norm 0.6' for methods of whole matrices: "
            "so that its norm is this fraction of the norm of the sum.",
            f"1; {USUAL_NORM} for methods of whole matrices")),
    }  # fmt: skip
    return {**found, **{name: declared(each) for name, each in PARAMETERS.items() if name not in found}}


#: All settings that a rule may set for its tensors.
METHOD_SETTINGS = _settings()
#: Their aliases: names in other tools, and a valid Python identifier for lambda.
METHOD_SYNONYMS = {**PARAMETER_ALIASES, f"{FACTOR}_": FACTOR}


def take_up() -> None:
    """Update the settings after methods were registered."""
    METHOD_SETTINGS.update(_settings())
    METHOD_SYNONYMS.update(PARAMETER_ALIASES)


class MethodSettings(Struct, frozen=True):
    """The given settings of methods.

    Attributes:
        given: The given settings by name, checked one by one; the others have their defaults.
        models: The number of models.
        has_base: Whether there is a base.
    """

    given: Mapping[str, object]
    models: int
    has_base: bool

    def __hash__(self) -> int:
        return hash((*self.given.items(), self.models, self.has_base))

    def __getitem__(self, name: str) -> Any:
        """The effective value of a setting."""
        value = self.given.get(name)
        return self._default(name) if value is None else value

    def _default(self, name: str) -> object:
        """The method's default, if it has one of its own, else the setting's."""
        if name == FACTOR:
            return USUAL_NORM if self.declared[1].matrix is not None else 1.0
        method = self.given.get("merge_method")
        usual = METHOD_SETTINGS[name].default
        return METHODS[str(method)].defaults.get(name, usual) if method is not None else usual

    def overridden(self, own: Mapping[str, object]) -> MethodSettings:
        """These settings with some replaced."""
        given = dict(self.given)
        if any(name in own for name in STEPS):
            for name in STEPS:
                given.pop(name, None)
            if own.get("merge_method") is None:
                given.update(zip(("sparsify_type", "merge_type"), self.steps, strict=True))
        given.update(own)
        changed = MethodSettings(given, self.models, self.has_base)
        if isinstance(given.get(FACTOR), str) and FACTOR not in own and changed.declared[1].matrix is None:
            given.pop(FACTOR)
        if not changed.has_weights:
            for name in WEIGHTS:
                if name not in own:
                    given.pop(name, None)
        return changed

    def check(self) -> None:
        """Check the settings against each other.

        Raises:
            RecipeError: If they contradict each other.
        """
        method, (sparsifier, combination) = self["merge_method"], self.declared
        check_method(method, self["merge_type"], self["sparsify_type"])
        needs_base = METHODS[method].needs_base if method is not None else combination.base == "required"
        check_models_of(self.name, combination, needs_base, self.models, self.has_base)
        check_weights(combination, self.models, self["weight_list"], self["normalize"])
        if isinstance(self[FACTOR], str) and combination.matrix is None:
            raise RecipeError(
                f"{FACTOR} is {self[FACTOR]!r}, which only methods of whole matrices can do; {self.name} is none",
                f"Give a number, or use one of {', '.join(_of_matrices())}.",
            )
        if self[FACTOR] != 1 and not self.has_base:
            raise RecipeError(
                f"{FACTOR} is {self[FACTOR]}, a factor on differences to a base, but base_model_path is not given",
                "Name the base, or give weight_list.",
            )
        for name, value in self.given.items():
            if METHOD_SETTINGS[name].is_per_model and isinstance(value, tuple) and len(value) != self.models:
                raise RecipeError(
                    f"{name} has {len(value)} values for {self.models} models", "Give one for all, or one per model."
                )
        applied = self.applied(range(self.models), 0)
        if sparsifier is not None:
            for model in range(self.models):
                check_step(sparsifier, applied.of(model))
        check_step(combination, applied.shared)

    @property
    def declared(self) -> tuple[Sparsifier | None, Combination]:
        """The declarations of both steps."""
        sparsify_type, merge_type = self.steps
        return SPARSIFIERS[sparsify_type] if sparsify_type else None, COMBINATIONS[merge_type]

    @property
    def steps(self) -> tuple[str | None, str]:
        """The effective (sparsify_type, merge_type)."""
        if self["merge_method"] is not None:
            return METHODS[self["merge_method"]].steps
        return self["sparsify_type"], self["merge_type"] or "linear"

    @property
    def name(self) -> str:
        """The method's name: its merge_method if that was given, else its steps."""
        return self["merge_method"] or " → ".join(step for step in self.steps if step)

    @property
    def has_weights(self) -> bool:
        """Whether the method takes weights."""
        return COMBINATIONS[self.steps[1]].weights != "none"

    @property
    def normalizes(self) -> bool:
        """The effective ``normalize``: without weights it is true, unless the method has another default."""
        if self["weight_list"] is None:
            return self._default("normalize") is not False
        return bool(self["normalize"])

    def weights(self, models: Sequence[int]) -> tuple[float, ...]:
        """The effective weights of some models, given by index."""
        weights = self._stated_weights(models)
        total = math.fsum(weights)
        is_relative = self["weight_list"] is None or self.normalizes
        return tuple(weight / total for weight in weights) if is_relative else weights

    def _stated_weights(self, models: Sequence[int]) -> tuple[float, ...]:
        weights = self["weight_list"] or (1.0,) * self.models
        return tuple(weights[model] for model in models)

    def applied(self, models: Sequence[int], seed: int) -> Applied:
        """The method for a merge of some models, given by index."""
        sparsifier, combination = self.declared
        weights = self.weights(models)
        if combination.weights == "relative" and self.normalizes:
            # The method divides by them, so their scale cancels; 1/3 rounded to float32 could tip tied votes.
            weights = self._stated_weights(models)
        settings = {name: self[name] for name in PARAMETERS}
        for name, value in settings.items():
            if isinstance(value, tuple):
                settings[name] = tuple(value[model] for model in models)
        settings["normalize"] = self.normalizes
        share = float(self[FACTOR].split()[1]) if isinstance(self[FACTOR], str) else None
        factor = self[FACTOR] if share is None else 1.0
        return apply(sparsifier, combination, weights, settings, seed=seed, streams=models, factor=factor, norm=share)

    def effective(self) -> dict[str, object]:
        """All effective settings, as JSON values."""
        settings: dict[str, object] = {name: as_json(self[name]) for name in METHOD_SETTINGS}
        settings["sparsify_type"], settings["merge_type"] = self.steps
        if self.has_weights:
            every = range(self.models)
            settings["weight_list"] = list(self._stated_weights(every) if self.normalizes else self.weights(every))
            settings["normalize"] = self.normalizes
        return settings

    def used(self) -> dict[str, object]:
        """The effective settings that the method uses, and those that select it."""
        names = {*STEPS, *(each.name for each in parameters_of(*self.declared))}
        names |= {*(WEIGHTS if self.has_weights else ()), *((FACTOR,) if self.has_base else ())}
        return {name: value for name, value in self.effective().items() if name in names}


def _of_matrices() -> list[str]:
    return [name for name, method in METHODS.items() if method.combination.matrix is not None]
