"""A parsed configuration: modules, slices, sources, and the parameters of each scope."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from modelfuse.errors import RecipeError
from modelfuse.recipe.arcee.methods import METHODS, MethodGrammar, ParameterSpec
from modelfuse.recipe.arcee.parameters import Parameters, Scalar, value_of
from modelfuse.recipe.arcee.references import Reference

#: The name of the only module of a language model, and of the one that ``models`` and ``slices`` make.
DEFAULT_MODULE = "default"


@dataclass(frozen=True, slots=True)
class Source:
    """One model of a slice.

    Attributes:
        model: The model.
        layers: Its range of layers, end exclusive; None for all.
        parameters: The parameters of this scope.
    """

    model: Reference
    layers: tuple[int, int] | None
    parameters: Parameters


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive layers of the output.

    Attributes:
        sources: The models that are merged.
        parameters: The parameters of this scope.
        base_model: The base of this slice; None: the configuration's.
    """

    sources: tuple[Source, ...]
    parameters: Parameters
    base_model: Reference | None = None


@dataclass(frozen=True, slots=True)
class ConfiguredModule:
    """A stack of layers with the other tensors of its part of the model.

    Attributes:
        slices: The output's layers in order; a slice without a range is whole models.
        parameters: The parameters of this scope.
    """

    slices: tuple[Slice, ...]
    parameters: Parameters


@dataclass(frozen=True, slots=True)
class TokenSource:
    """The source of a token's row.

    Attributes:
        kind: ``zero``; ``model``: a model's row of the same token; ``model_token``: a model's row of another token.
        model: That model.
        token: The text of that other token.
        token_id: The id of that other token.
        force: Whether it also replaces the rows of models that have the token.
    """

    kind: str
    model: Reference | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """The tokenizer of the output.

    Attributes:
        source: ``union``, ``base`` or a model.
        tokens: Tokens with a source of their own; None: the token is only required to be present.
        pad_to_multiple_of: The number of rows is padded to a multiple of this.
    """

    source: str | Reference
    tokens: Mapping[str, TokenSource | None]
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True, slots=True)
class Configuration:
    """One parsed document.

    Attributes:
        name: The document's name, if there are several.
        merge_method: The method.
        modules: The modules by name.
        applies_to_all: Whether the same applies to all modules of the models.
        base_model: The base.
        parameters: The parameters of the global scope.
        dtype: The output type, unless ``out_dtype`` is given.
        out_dtype: The output type.
        tokenizer: The tokenizer of the output; None: the base's files.
        chat_template: ``auto``, a name, or a template.
        notes: Notes on settings without effect.
    """

    name: str | None
    merge_method: str
    modules: Mapping[str, ConfiguredModule]
    applies_to_all: bool
    base_model: Reference | None
    parameters: Parameters
    dtype: str | None
    out_dtype: str | None
    tokenizer: TokenizerSettings | None
    chat_template: str | None
    notes: tuple[str, ...]

    @property
    def grammar(self) -> MethodGrammar:
        """The models and parameters that the method takes."""
        return METHODS[self.merge_method]

    @property
    def references(self) -> tuple[Reference, ...]:
        """All distinct models: the base first, then in order."""
        return tuple(dict.fromkeys(self._references()))

    def _references(self) -> Iterator[Reference]:
        if self.base_model is not None:
            yield self.base_model
        for module in self.modules.values():
            for each in module.slices:
                yield from (source.model for source in each.sources)
        if self.tokenizer is not None:
            if isinstance(self.tokenizer.source, Reference):
                yield self.tokenizer.source
            for token in self.tokenizer.tokens.values():
                if token is not None and token.model is not None:
                    yield token.model

    def base_of(self, part: Slice) -> Reference | None:
        """The base of a slice."""
        return part.base_model or self.base_model

    def whole_values(self, module: ConfiguredModule, part: Slice, name: str, depth: float) -> dict[str, Scalar | None]:
        """The parameters of the merge for one tensor.

        Args:
            module: The tensor's module.
            part: The tensor's slice.
            name: The tensor's name in the output.
            depth: The depth at which gradients are evaluated.

        Raises:
            RecipeError: If a required parameter is missing.
        """
        scopes = (part.parameters, module.parameters, self.parameters)
        return {
            key: _value(parameter, key, scopes, name, depth, f"{self.merge_method} for the tensor {name}")
            for key, parameter in self.grammar.whole.items()
        }

    def model_values(
        self, module: ConfiguredModule, part: Slice, source: Source, name: str, depth: float
    ) -> dict[str, Scalar | None]:
        """The parameters of one model for one tensor.

        Args:
            module: The tensor's module.
            part: The tensor's slice.
            source: The model.
            name: The tensor's name in that model.
            depth: The depth at which gradients are evaluated.

        Raises:
            RecipeError: If a required parameter is missing.
        """
        scopes = (source.parameters, part.parameters, module.parameters, self.parameters)
        is_base = self.grammar.base != "ignored" and source.model == self.base_of(part)
        return {
            key: _value(parameter, key, scopes, name, depth,
                        None if is_base else f"the tensor {name} of {source.model}")
            for key, parameter in self.grammar.per_model.items()
        }  # fmt: skip


def _value(
    parameter: ParameterSpec, key: str, scopes: tuple[Parameters, ...], name: str, depth: float, needed_by: str | None
) -> Scalar | None:
    """The value of the innermost scope that has one.

    Args:
        parameter: The parameter.
        key: Its name.
        scopes: The scopes, innermost first.
        name: The tensor's name, for filters.
        depth: The depth at which gradients are evaluated.
        needed_by: What needs it, for an error; None: it may be missing.
    """
    for scope in scopes:
        if key in scope and (value := value_of(scope[key], name, depth)) is not None:
            return value
    if parameter.is_required and needed_by is not None:
        raise RecipeError(
            f"The parameter {key} is not given for {needed_by}",
            f"Give {key} under parameters: of the model, or of the whole configuration as a default.",
        )
    return parameter.default
