"""Parse one document of a configuration file to a :class:`Configuration`, with all checks that need no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from modelfuse.dtypes import OUTPUT_DTYPES
from modelfuse.errors import RecipeError
from modelfuse.recipe.arcee.configuration import (
    DEFAULT_MODULE,
    Configuration,
    ConfiguredModule,
    Slice,
    Source,
    TokenizerSettings,
)
from modelfuse.recipe.arcee.methods import METHODS, WITHOUT_EFFECT, ParameterSpec
from modelfuse.recipe.arcee.notes import Notes
from modelfuse.recipe.arcee.parameters import Parameters, read_setting
from modelfuse.recipe.arcee.references import Reference, References
from modelfuse.recipe.arcee.tokens import read_tokenizer
from modelfuse.recipe.checks import nearest, shown
from modelfuse.recipe.files import CONTENT_KEYS

TOP_KEYS = ("merge_method", *CONTENT_KEYS, "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
            "tokenizer", "chat_template", "name")  # fmt: skip
MODEL_KEYS, SOURCE_KEYS = ("model", "parameters"), ("model", "layer_range", "parameters")
SLICE_KEYS, MODULE_KEYS = ("sources", "parameters", "base_model", "residual_weight"), ("models", "slices", "parameters")
DTYPES = ("float32", "float16", "bfloat16", "float64")
MOST_LAYERS = 1_000_000


def read_configuration(content: object, references: References) -> Configuration:
    """Parse one document; whether its models fit together is not checked.

    Args:
        content: The content of the YAML document.
        references: Reads references to models.

    Raises:
        RecipeError: If anything in it is invalid.
    """
    if not isinstance(content, Mapping):
        raise RecipeError("The configuration is not a map of keys to values")
    return _Reader(references).configuration(content)


class _Reader:
    """Parses one document."""

    def __init__(self, references: References) -> None:
        self._references, self._notes = references, Notes()
        self._grammar = METHODS["linear"]

    def configuration(self, content: Mapping[object, object]) -> Configuration:
        method = content.get("merge_method")
        if not isinstance(method, str) or method not in METHODS:
            known = nearest(method, METHODS) if isinstance(method, str) else f"Methods: {', '.join(METHODS)}."
            raise RecipeError(f"merge_method is {shown(method)}, which is no method", known)
        self._grammar = METHODS[method]
        self._notes.unknown(content, TOP_KEYS, "", self._names)
        base = None if content.get("base_model") is None else self._model(content["base_model"], "base_model")
        read = Configuration(
            read_text(content, "name"), method, self._modules(content, base), content.get("modules") is None, base,
            self._parameters(content, "parameters"), read_dtype(content, "dtype"), read_dtype(content, "out_dtype"),
            self._tokenizer(content), read_text(content, "chat_template"), (),
        )  # fmt: skip
        return replace(read, notes=tuple(self._notes.lines))

    @property
    def _names(self) -> tuple[str, ...]:
        """All parameters of the method."""
        return (*self._grammar.per_model, *self._grammar.whole)

    def _model(self, value: object, where: str) -> Reference:
        return self._references.read(value, where, self._notes)

    def _tokenizer(self, content: Mapping[object, object]) -> TokenizerSettings | None:
        return read_tokenizer(content, self._model, self._notes)

    def _modules(self, content: Mapping[object, object], base: Reference | None) -> dict[str, ConfiguredModule]:
        given = [key for key in CONTENT_KEYS if content.get(key)]
        if len(given) != 1:
            what = f"{' and '.join(given)} are given" if given else "None of models, slices and modules is given"
            raise RecipeError(what, "A configuration has exactly one of them, and something in it.")
        if given[0] != "modules":
            return {DEFAULT_MODULE: ConfiguredModule(self._slices(content, given[0], "", base), {})}
        return {name: self._module(each, f"modules.{name}", base)
                for name, each in _map(content, "modules", "modules").items()}  # fmt: skip

    def _module(self, content: object, where: str, base: Reference | None) -> ConfiguredModule:
        if not isinstance(content, Mapping):
            raise RecipeError(f"{where} is {shown(content)}", "Write models: or slices: below it.")
        self._notes.unknown(content, MODULE_KEYS, where, self._names)
        given = [key for key in ("models", "slices") if content.get(key)]
        if len(given) != 1:
            raise RecipeError(f"{where} has {len(given)} of models and slices", "Give exactly one of them.")
        return ConfiguredModule(
            self._slices(content, given[0], f"{where}.", base), self._parameters(content, f"{where}.")
        )

    def _slices(
        self, content: Mapping[object, object], key: str, where: str, base: Reference | None
    ) -> tuple[Slice, ...]:
        listed = read_list(content, key, where + key)
        if key == "slices":
            return tuple(self._slice(each, f"{where}slices[{number}]") for number, each in enumerate(listed))
        sources = [self._source(each, f"{where}models[{number}]", False) for number, each in enumerate(listed)]
        if base is not None and all(source.model != base for source in sources):
            sources.append(Source(base, None, {}))
        return (Slice(tuple(sources), {}),)

    def _slice(self, content: object, where: str) -> Slice:
        if not isinstance(content, Mapping):
            raise RecipeError(f"{where} is {shown(content)}", "Write sources: below it.")
        self._notes.unknown(content, SLICE_KEYS, where, self._names)
        if "residual_weight" in content:
            self._notes.add(f"residual_weight of {where} has no effect")
        listed = read_list(content, "sources", f"{where}.sources")
        base = content.get("base_model")
        return Slice(
            tuple(self._source(each, f"{where}.sources[{number}]", True) for number, each in enumerate(listed)),
            self._parameters(content, f"{where}."),
            None if base is None else self._model(base, f"{where}.base_model"),
        )

    def _source(self, content: object, where: str, has_range: bool) -> Source:
        if isinstance(content, str):
            raise RecipeError(f"{where} is {content!r}", f"Write it as model: {content}")
        if not isinstance(content, Mapping) or content.get("model") is None:
            raise RecipeError(f"{where} names no model", "Write model: NAME in each entry.")
        self._notes.unknown(content, SOURCE_KEYS if has_range else MODEL_KEYS, where, self._grammar.per_model)
        return Source(
            self._model(content["model"], f"{where}.model"),
            _layers(content.get("layer_range"), f"{where}.layer_range") if has_range else None,
            self._parameters(content, f"{where}.", self._grammar.per_model),
        )

    def _parameters(
        self, content: Mapping[object, object], where: str, known: Mapping[str, ParameterSpec] | None = None
    ) -> Parameters:
        """The parameters of one scope: all of the method's, or those in ``known``."""
        where = "parameters" if where == "parameters" else f"{where}parameters"
        if content.get("parameters") is None:
            return {}
        given = _map(content, "parameters", where)
        everything = {**self._grammar.per_model, **self._grammar.whole}
        known = everything if known is None else known
        misplaced = [key for key in given if key in everything and key not in known and key not in WITHOUT_EFFECT]
        for key in misplaced:
            self._notes.add(f"{key} of {where} has no effect: it is a parameter of the whole merge, not of one model")
        self._notes.unknown({key: given[key] for key in given if key not in everything}, known, where)
        return {key: read_setting(given[key], parameter.kind, f"{where}.{key}", self._notes)
                for key, parameter in known.items() if key in given}  # fmt: skip


def _layers(value: object, where: str) -> tuple[int, int]:
    ends = value if isinstance(value, list) else []
    if len(ends) != 2 or not all(type(each) is int and 0 <= each <= MOST_LAYERS for each in ends):
        raise RecipeError(f"{where} is {shown(value)}", "Give the first layer and the one after the last, as [0, 16].")
    if ends[0] >= ends[1]:
        raise RecipeError(f"{where} is {ends}, which has no layers in it", "The end comes after the last layer.")
    return ends[0], ends[1]


def read_dtype(content: Mapping[object, object], key: str) -> str | None:
    """The name of an output type, if one is given."""
    value = content.get(key)
    if value is None:
        return None
    name = value.removeprefix("torch.") if isinstance(value, str) else None
    if name not in DTYPES:
        if name is not None and name in OUTPUT_DTYPES:
            raise RecipeError(f"{key} is {value!r}", f"Write {OUTPUT_DTYPES[name]}.")
        raise RecipeError(f"{key} is {shown(value)}, in which no weights are merged", f"Give {', '.join(DTYPES)}.")
    return name


def read_text(content: Mapping[object, object], key: str) -> str | None:
    """The text at a key, if there is one."""
    value = content.get(key)
    if value is not None and not isinstance(value, str):
        raise RecipeError(f"{key} is {shown(value)}, which is no text")
    return value


def read_list(content: Mapping[object, object], key: str, where: str) -> Sequence[object]:
    """The list at a key."""
    value = content.get(key)
    if not isinstance(value, list) or not value:
        raise RecipeError(f"{where} is {shown(value)}", "Give a list, each entry after a dash.")
    return value


def _map(content: Mapping[object, object], key: str, where: str) -> Mapping[str, Any]:
    value = content.get(key)
    if not isinstance(value, Mapping) or not all(isinstance(each, str) for each in value):
        raise RecipeError(f"{where} is {shown(value)}", "Give a map of names to values.")
    return value
