"""What is to be merged and how: all settings, and every check that needs no file.

Flags, recipe files and the Python API all become a :class:`Recipe`; nothing downstream checks a setting again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from modelfuse.errors import RecipeError
from modelfuse.methods.applied import Applied
from modelfuse.recipe.adapter_base import base_of
from modelfuse.recipe.checks import (
    check_adapter_output,
    check_configured,
    check_copied,
    check_device,
    check_engine,
    check_input_layout,
    check_models,
    check_output_format,
    check_tokenizer,
    nearest,
)
from modelfuse.recipe.files import RECORD
from modelfuse.recipe.hub_names import HubName
from modelfuse.recipe.installed_methods import register_installed
from modelfuse.recipe.method_settings import METHOD_SETTINGS, METHOD_SYNONYMS, STEPS, MethodSettings, take_up
from modelfuse.recipe.schema import Setting, as_json, checked, settings_of
from modelfuse.recipe.settings import Settings
from modelfuse.recipe.tensor_rules import Rule, checked_rules, rule_as_json
from modelfuse.storage import Place

if TYPE_CHECKING:
    from modelfuse.recipe.arcee.configuration import Configuration
    from modelfuse.recipe.arcee.documents import Configurations

#: Keys that merge_config.json holds beside the settings; a recipe may carry them.
INFORMATION = (RECORD,)
#: The layout of the formats that an output can have.
LAYOUTS: Mapping[str, Literal["hf", "paddle"]] = {"hf": "hf", "paddle": "paddle", "pdparams": "paddle"}
#: Other ways to give model_path_list: as one string, and as the one adapter to merge.
ANOTHER_WAY = ("model_path_str", "lora_model_path")
#: Other names of a setting.
SYNONYMS = {"model_prefix": "merge_prefix", **METHOD_SYNONYMS}


@dataclass(frozen=True, kw_only=True, init=False)
class Recipe(Settings):
    """What to merge, how, and where to. Frozen; paths are absolute.

    Args:
        settings: By name, those of methods beside the others.

    Attributes:
        parameters: The settings of methods.

    Raises:
        RecipeError: If a setting has a wrong type or value, or contradicts another.
    """

    def __init__(self, **settings: object) -> None:
        if unknown := settings.keys() - SETTINGS.keys():
            raise TypeError(f"a recipe has no setting {min(unknown)!r}")
        read = checked(SETTINGS, {**{name: each.default for name, each in SETTINGS.items()}, **settings})
        given = {name: read.pop(name) for name in METHOD_SETTINGS}
        given = {name: value for name, value in given.items() if settings.get(name) is not None}
        vars(self).update(read)
        vars(self)["parameters"] = MethodSettings(given, len(self.model_path_list), self.has_base)
        self._check()

    @classmethod
    def parse(cls, settings: Mapping[str, object]) -> Recipe:
        """Build a recipe from named settings, as they come from flags, a file or keyword arguments.

        Raises:
            RecipeError: As the class says; an unknown name is answered with the nearest one.
        """
        words = {name: settings.get(name) for name in STEPS}
        _look_further(isinstance(each, str) and each not in SETTINGS[name].choices for name, each in words.items())
        return cls(**_canonical(settings))

    def changed(self, **changes: object) -> Recipe:
        """The same with other values, which are not checked again."""
        other = copy(self)
        vars(other).update(changes)
        vars(other).pop("configurations", None)  # What models are called is found in it.
        return other

    def _check(self) -> None:
        """Refuse settings that contradict each other."""
        if self.mergekit is None:
            check_models(len(self.model_path_list), self.has_base)
        else:
            others = {**self.parameters.given, "base_model_path": self.base_model_path, "rules": self.rules or None,
                      "merge_with_qdq_base_model": self.merge_with_qdq_base_model or None,
                      "tokenizer": self.tokenizer}  # fmt: skip
            check_configured([name for name, value in others.items() if value is not None], self.output_format)
            _ = self.configuration
        check_device(self.tensor_type, self.device)
        check_engine(self.engine, self.ray_address, self.tensor_type)
        self.parameters.check()
        vars(self)["rules"] = checked_rules(self.rules, self.inputs, lambda rule: self.parameters_of(rule).check())
        check_copied(self.copy_file_list)
        check_input_layout(len(self.inputs), self.input_layout, self.convert_from_hf)
        check_output_format(self.output_format, LAYOUTS.get(self.output_format or ""), self.save_to_hf)
        check_adapter_output(self.output_format, self.lora_rank, self.has_base)
        check_tokenizer(self.tokenizer, self.tokenizer_from, self.inputs, self.output_format)
        if self.tokenizer is not None and not isinstance(self.tokenizer, str):
            vars(self)["tokenizer_from"] = self.tokenizer

    @property
    def inputs(self) -> tuple[Place | HubName, ...]:
        """The models in order, then the base if there is one."""
        return self.model_path_list if self.base_model_path is None else (*self.model_path_list, self.base_model_path)

    @property
    def has_base(self) -> bool:
        """Whether the last of the inputs is the base."""
        return self.base_model_path is not None

    @property
    def reference(self) -> int:
        """The number of the input that the output takes its files, names and types from: the base's, else 0."""
        return len(self.model_path_list) if self.has_base else 0

    @property
    def hub_names(self) -> tuple[HubName, ...]:
        """Those that are hub names, each once."""
        named = (*self.inputs, self.tokenizer_from)
        return tuple(dict.fromkeys(each for each in named if isinstance(each, HubName)))

    @property
    def input_paths(self) -> tuple[Place, ...]:
        """Where the inputs are, once all are at hand."""
        paths = tuple(each.folder if isinstance(each, HubName) else each for each in self.inputs)
        if missing := [str(each) for each, path in zip(self.inputs, paths, strict=True) if path is None]:
            raise ValueError(f"{', '.join(missing)}: not fetched yet")
        return tuple(path for path in paths if path is not None)

    @property
    def model_paths(self) -> tuple[Place, ...]:
        """Where the models are, without the base."""
        return self.input_paths[: len(self.model_path_list)]

    @property
    def base_path(self) -> Place | None:
        """Where the base is, if there is one."""
        return None if self.base_model_path is None else self.input_paths[-1]

    @property
    def tokenizer_path(self) -> Place | None:
        """Where the tokenizer is taken from, if that is given."""
        return self.tokenizer_from.folder if isinstance(self.tokenizer_from, HubName) else self.tokenizer_from

    def at_hand(self, found: Mapping[object, HubName]) -> Recipe:
        """The same with what hub names have become: a commit, and a folder."""
        update: dict[str, object] = {"model_path_list": tuple(found.get(each, each) for each in self.model_path_list)}
        for name in ("base_model_path", "unmerged_from", "tokenizer_from", "tokenizer"):
            update[name] = found.get(getattr(self, name), getattr(self, name))
        return self.changed(**update)

    def declared_layouts(self, formats: Sequence[str]) -> tuple[Literal["hf", "paddle"] | None, ...]:
        """The layout that the settings give each input, None where they say nothing.

        Args:
            formats: The format of every input: ``safetensors``, ``torch`` or ``paddle``.
        """
        if self.input_layout is not None:
            return self.input_layout if len(self.input_layout) > 1 else self.input_layout * len(formats)
        if self.convert_from_hf is None:
            return (None,) * len(formats)
        # Paddle's own files hold Paddle's layout, and its tool loads them as they are.
        return tuple("paddle" if not self.convert_from_hf else None if kind == "paddle" else "hf" for kind in formats)

    @property
    def output_layout(self) -> Literal["hf", "paddle"] | None:
        """The layout that the settings give the output; None: that of the base, else of the first model."""
        if self.output_format is not None and self.output_format in LAYOUTS:
            return LAYOUTS[self.output_format]
        return None if self.save_to_hf is None else "hf" if self.save_to_hf else "paddle"

    @property
    def weights(self) -> tuple[float, ...]:
        """The effective weights, one a model, where no rule says otherwise."""
        return self.parameters.weights(range(len(self.model_path_list)))

    @property
    def method(self) -> Applied:
        """All that the mathematics depends on, where no rule says otherwise."""
        return self.parameters.applied(range(len(self.model_path_list)), self.seed)

    @cached_property
    def configurations(self) -> Configurations:
        """What the text of ``mergekit`` says."""
        from modelfuse.recipe.arcee.documents import read_configurations

        return read_configurations(self.mergekit or "", self.model_path_list)

    @property
    def configuration(self) -> Configuration:
        """The document of ``mergekit`` whose result is the output."""
        return self.configurations.named(self.mergekit_document)

    @property
    def method_told(self) -> tuple[str, str | None, list[float]]:
        """What a report tells of the method: (merge_type, sparsify_type) and weights, or a configuration's method."""
        if self.mergekit is not None:
            return self.configuration.merge_method, None, []
        sparsify_type, merge_type = self.parameters.steps
        return merge_type, sparsify_type, list(self.weights)

    def parameters_of(self, rule: Rule) -> MethodSettings:
        """The settings of methods where a rule holds: its own, else the recipe's."""
        return self.parameters.overridden(dict(rule.own))

    def effective(self) -> dict[str, object]:
        """Every setting as it took effect, ready for JSON; parsing it gives the same merge."""
        methods, settings = self.parameters.effective(), dict[str, object]()
        for name in SETTINGS:
            settings[name] = methods[name] if name in methods else as_json(getattr(self, name))
        settings["rules"] = [rule_as_json(rule, self.inputs, self.parameters_of(rule).used()) for rule in self.rules]
        if not self.rules:
            del settings["rules"]
        if self.mergekit is None:
            return settings
        # What the configuration says is said nowhere else.
        own = (*METHOD_SETTINGS, "base_model_path", "merge_with_qdq_base_model", "tokenizer")
        return {name: value for name, value in settings.items() if name not in own}


def _settings() -> dict[str, Setting]:
    """All settings by name, those of methods in their place."""
    found = settings_of(Recipe)
    before = list(found)[: list(found).index("rules")]
    return {**{name: found[name] for name in before}, **METHOD_SETTINGS, **found}


SETTINGS = _settings()


def _look_further(unknown: Iterable[bool]) -> None:
    """Take up methods of other packages, if any name is not known."""
    if any(unknown) and register_installed():
        renew()


def renew() -> None:
    """Take up methods that were registered since, and their settings."""
    take_up()
    SETTINGS.update(_settings())
    SYNONYMS.update(METHOD_SYNONYMS)


def canonical_name(name: str) -> str:
    """A setting's name with dashes made underscores and synonyms resolved.

    Raises:
        RecipeError: If there is no such setting; names the nearest.
    """
    plain = name.replace("-", "_")
    plain = SYNONYMS.get(plain, plain)
    _look_further([plain not in (*SETTINGS, *INFORMATION, *ANOTHER_WAY)])
    if (plain := SYNONYMS.get(plain, plain)) not in (*SETTINGS, *INFORMATION, *ANOTHER_WAY):
        raise RecipeError(f"There is no setting {name!r}", nearest(plain, (*SETTINGS, *ANOTHER_WAY)))
    return plain


def by_canonical_name(settings: Mapping[str, object]) -> dict[str, object]:
    """The same settings by their :func:`canonical_name`.

    Raises:
        RecipeError: If there is no such setting, or one is given under two names.
    """
    named: dict[str, object] = {}
    for name, value in settings.items():
        plain = canonical_name(name)
        if plain in named:
            raise RecipeError(f"The setting {plain} is given twice")
        named[plain] = value
    return named


def _canonical(settings: Mapping[str, object]) -> dict[str, object]:
    named = {name: value for name, value in by_canonical_name(settings).items() if name not in INFORMATION}
    if isinstance(named.get("missing"), str):
        named["missing"] = [named["missing"]]
    joined = named.pop("model_path_str", None)
    if joined is not None:
        if named.get("model_path_list"):
            raise RecipeError("model_path_str and model_path_list are both given", "Give one of them.")
        if not isinstance(joined, str):
            raise RecipeError("model_path_str is not a comma-separated string")
        named["model_path_list"] = [part for part in (part.strip() for part in joined.split(",")) if part]
    adapter = named.pop("lora_model_path", None)
    if adapter is not None:
        if named.get("model_path_list"):
            raise RecipeError(
                "lora_model_path and models are both given", "Name adapters in model_path_list, beside other models."
            )
        if named.get("base_model_path") is None:
            named["base_model_path"] = base_of(adapter)
        named["model_path_list"] = [adapter]
    text = named.get("mergekit")
    if isinstance(text, str) and not named.get("model_path_list"):
        from modelfuse.recipe.arcee.documents import read_configurations

        named["model_path_list"] = list(read_configurations(text).models.values())
    for name in ("model_path_list", "weight_list", "rules", "copy_file_list"):
        if named.get(name) is None:
            named.pop(name, None)
    return named
