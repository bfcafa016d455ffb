"""The recipe: all settings of a merge, and every check that needs no file.

Flags, recipe files and API calls are converted to a :class:`Recipe`; nothing downstream checks a setting again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from modelfuse.methods.applied import Applied
from modelfuse.recipe.checks import (
    check_adapter_output,
    check_configured,
    check_copied,
    check_device,
    check_engine,
    check_grams,
    check_input_layout,
    check_models,
    check_output_format,
    check_tokenizer,
)
from modelfuse.recipe.hub_names import HubName
from modelfuse.recipe.method_settings import METHOD_SETTINGS, MethodSettings
from modelfuse.recipe.names import SETTINGS, canonical
from modelfuse.recipe.schema import as_json, checked
from modelfuse.recipe.settings import Settings
from modelfuse.recipe.tensor_rules import Rule, checked_rules, rule_as_json
from modelfuse.storage import PathOrUrl

if TYPE_CHECKING:
    from modelfuse.recipe.arcee.configuration import Configuration
    from modelfuse.recipe.arcee.documents import Configurations

#: The layouts of output formats.
LAYOUTS: Mapping[str, Literal["hf", "paddle"]] = {"hf": "hf", "paddle": "paddle", "pdparams": "paddle"}


@dataclass(frozen=True, kw_only=True, init=False)
class Recipe(Settings):
    """All settings of a merge. Frozen; paths are absolute.

    Args:
        settings: The settings by name, including those of methods.

    Attributes:
        parameters: The settings of methods.

    Raises:
        RecipeError: If a setting has an invalid type or value, or contradicts another.
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
            RecipeError: As for the class; for an unknown name it suggests the closest one.
        """
        return cls(**canonical(settings))

    def changed(self, **changes: object) -> Recipe:
        """A copy with changed settings, which are not checked again."""
        other = copy(self)
        vars(other).update(changes)
        vars(other).pop("configurations", None)  # It depends on the settings.
        return other

    def _check(self) -> None:
        """Check the settings against each other."""
        if self.mergekit is None:
            check_models(len(self.model_path_list), self.has_base)
        else:
            others = {**self.parameters.given, "base_model_path": self.base_model_path, "rules": self.rules or None,
                      "merge_with_qdq_base_model": self.merge_with_qdq_base_model or None,
                      "tokenizer": self.tokenizer}  # fmt: skip
            check_configured([name for name, value in others.items() if value is not None], self.output_format)
            _ = self.configurations.mixture or self.configuration
        check_device(self.tensor_type, self.device)
        check_engine(self.engine, self.ray_address, self.tensor_type)
        self.parameters.check()
        vars(self)["rules"] = checked_rules(self.rules, self.inputs, lambda rule: self.parameters_of(rule).check())
        check_grams(len(self.gram_list), len(self.model_path_list), self._takers_of_grams())
        check_copied(self.copy_file_list)
        check_input_layout(len(self.inputs), self.input_layout, self.convert_from_hf)
        layout = LAYOUTS.get(self.output_format or "")
        check_output_format(self.output_format, layout, self.save_to_hf, self.safe_serialization)
        adapters = [name for name in SETTINGS if name.startswith("lora_")]
        given = [name for name in adapters if getattr(self, name) != SETTINGS[name].default]
        check_adapter_output(self.output_format, self.has_base, given)
        check_tokenizer(self.tokenizer, self.tokenizer_from, self.inputs, self.output_format)
        if self.tokenizer is not None and not isinstance(self.tokenizer, str):
            vars(self)["tokenizer_from"] = self.tokenizer

    def _takers_of_grams(self) -> list[str]:
        """The methods that take Gram matrices from files."""
        every = [self.parameters, *(self.parameters_of(rule) for rule in self.rules if rule.take is None)]
        declared = [(each.name, each.declared[1].matrix) for each in every]
        return [name for name, how in declared if how is not None and how.gram == "given"]

    @property
    def inputs(self) -> tuple[PathOrUrl | HubName, ...]:
        """The models in order, then the base if there is one."""
        return self.model_path_list if self.base_model_path is None else (*self.model_path_list, self.base_model_path)

    @property
    def has_base(self) -> bool:
        """Whether the last of the inputs is the base."""
        return self.base_model_path is not None

    @property
    def reference(self) -> int:
        """The index of the input that the output takes files, names and types from: the base's, else 0."""
        return len(self.model_path_list) if self.has_base else 0

    @property
    def hub_names(self) -> tuple[HubName, ...]:
        """The distinct hub names among the inputs."""
        named = (*self.inputs, self.tokenizer_from)
        return tuple(dict.fromkeys(each for each in named if isinstance(each, HubName)))

    @property
    def input_paths(self) -> tuple[PathOrUrl, ...]:
        """The paths of the inputs, once all are fetched."""
        paths = tuple(each.folder if isinstance(each, HubName) else each for each in self.inputs)
        if missing := [str(each) for each, path in zip(self.inputs, paths, strict=True) if path is None]:
            raise ValueError(f"{', '.join(missing)}: not fetched yet")
        return tuple(path for path in paths if path is not None)

    @property
    def model_paths(self) -> tuple[PathOrUrl, ...]:
        """The paths of the models, without the base."""
        return self.input_paths[: len(self.model_path_list)]

    @property
    def base_path(self) -> PathOrUrl | None:
        """The path of the base, if there is one."""
        return None if self.base_model_path is None else self.input_paths[-1]

    @property
    def tokenizer_path(self) -> PathOrUrl | None:
        """The path of ``tokenizer_from``, if it is given."""
        return self.tokenizer_from.folder if isinstance(self.tokenizer_from, HubName) else self.tokenizer_from

    def at_hand(self, found: Mapping[object, HubName]) -> Recipe:
        """A copy in which hub names are resolved to a commit and a folder."""
        update: dict[str, object] = {"model_path_list": tuple(found.get(each, each) for each in self.model_path_list)}
        for name in ("base_model_path", "unmerged_from", "tokenizer_from", "tokenizer"):
            update[name] = found.get(getattr(self, name), getattr(self, name))
        return self.changed(**update)

    def declared_layouts(self, formats: Sequence[str]) -> tuple[Literal["hf", "paddle"] | None, ...]:
        """The declared layout of each input; None if the settings do not declare it.

        Args:
            formats: The format of each input: ``safetensors``, ``torch`` or ``paddle``.
        """
        if self.input_layout is not None:
            return self.input_layout if len(self.input_layout) > 1 else self.input_layout * len(formats)
        if self.convert_from_hf is None:
            return (None,) * len(formats)
        # Paddle's files have Paddle's layout, and its tool loads them unchanged.
        return tuple("paddle" if not self.convert_from_hf else None if kind == "paddle" else "hf" for kind in formats)

    @property
    def output_layout(self) -> Literal["hf", "paddle"] | None:
        """The declared layout of the output; None: that of the base, else of the first model."""
        if self.output_format is not None and self.output_format in LAYOUTS:
            return LAYOUTS[self.output_format]
        return None if self.save_to_hf is None else "hf" if self.save_to_hf else "paddle"

    @property
    def weights(self) -> tuple[float, ...]:
        """The effective weights, one per model, outside of rules."""
        return self.parameters.weights(range(len(self.model_path_list)))

    @property
    def method(self) -> Applied:
        """The method, outside of rules."""
        return self.parameters.applied(range(len(self.model_path_list)), self.seed)

    @cached_property
    def configurations(self) -> Configurations:
        """The parsed text of ``mergekit``."""
        from modelfuse.recipe.arcee.documents import read_configurations

        return read_configurations(self.mergekit or "", self.model_path_list)

    @property
    def configuration(self) -> Configuration:
        """The document of ``mergekit`` whose result is the output."""
        return self.configurations.named(self.mergekit_document)

    @property
    def method_told(self) -> tuple[str, str | None, list[float]]:
        """The method in a report: merge_type, sparsify_type and weights, or a configuration's method."""
        if self.mergekit is not None:
            mixture = self.configurations.mixture
            return self.configuration.merge_method if mixture is None else mixture.merge_method, None, []
        sparsify_type, merge_type = self.parameters.steps
        return merge_type, sparsify_type, list(self.weights)

    def parameters_of(self, rule: Rule) -> MethodSettings:
        """The settings of methods for a rule: its own, else the recipe's."""
        return self.parameters.overridden(dict(rule.own))

    def effective(self) -> dict[str, object]:
        """All effective settings as JSON values; parsing them gives the same merge."""
        methods, settings = self.parameters.effective(), dict[str, object]()
        for name in SETTINGS:
            settings[name] = methods[name] if name in methods else as_json(getattr(self, name))
        settings["rules"] = [rule_as_json(rule, self.inputs, self.parameters_of(rule).used()) for rule in self.rules]
        if not self.rules:
            del settings["rules"]
        if self.mergekit is None:
            return settings
        # These are part of the configuration's text.
        own = (*METHOD_SETTINGS, "base_model_path", "merge_with_qdq_base_model", "tokenizer")
        return {name: value for name, value in settings.items() if name not in own}
