"""A configuration as values: modules, slices, sources, and the parameters of every scope."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from modelfuse.errors import RecipeError
from modelfuse.recipe.arcee.methods import METHODS, MethodGrammar, Parameter
from modelfuse.recipe.arcee.parameters import Parameters, Scalar, value_of
from modelfuse.recipe.arcee.references import Reference

#: The name of the only module of a language model, and of the one that ``models`` and ``slices`` make.
DEFAULT_MODULE = "default"


@dataclass(frozen=True, slots=True)
class Source:
    """One model of a slice.

    Attributes:
        model: Which model.
        layers: Its layers, the end exclusive; None for all that it has.
        parameters: Its own.
    """

    model: Reference
    layers: tuple[int, int] | None
    parameters: Parameters


@dataclass(frozen=True, slots=True)
class Slice:
    """Some consecutive layers of the output.

    Attributes:
        sources: The models that are merged there.
        parameters: Those of this slice.
        base_model: The base here; None for the configuration's.
    """

    sources: tuple[Source, ...]
    parameters: Parameters
    base_model: Reference | None = None


@dataclass(frozen=True, slots=True)
class Module:
    """A stack of layers with what belongs to it.

    Attributes:
        slices: The output's layers in order; one without a range of layers is all of the models.
        parameters: Those of this module.
    """

    slices: tuple[Slice, ...]
    parameters: Parameters


@dataclass(frozen=True, slots=True)
class TokenSource:
    """Where the row of a token comes from.

    Attributes:
        kind: ``zero``; ``model``: a model's row of the same token; ``model_token``: a model's row of another one.
        model: That model.
        token: That other token's text.
        token_id: Its number.
        force: Whether it replaces the rows of models that have the token.
    """

    kind: str
    model: Reference | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """Which tokenizer the output gets.

    Attributes:
        source: ``union``, ``base`` or a model.
        tokens: Tokens whose rows come from somewhere particular; None: as the others, but present.
        pad_to_multiple_of: What the number of rows is to be a multiple of.
    """

    source: str | Reference
    tokens: Mapping[str, TokenSource | None]
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True, slots=True)
class Configuration:
    """All that one document says.

    Attributes:
        name: The document's, where there are several.
        merge_method: The method.
        modules: What is merged, by the name of the module.
        applies_to_all: Whether it is the same for all modules that the models have.
        base_model: The base.
        parameters: Those of the global scope.
        dtype: The type that there is to be stored in unless ``out_dtype`` says otherwise.
        out_dtype: The type to store.
        tokenizer: Which tokenizer the output gets; None: the base's files.
        chat_template: ``auto``, a name, or a template.
        notes: What has no effect.
    """

    name: str | None
    merge_method: str
    modules: Mapping[str, Module]
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
        """What the method takes."""
        return METHODS[self.merge_method]

    @property
    def references(self) -> tuple[Reference, ...]:
        """Every model that is named, each once: the base first, then as listed."""
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

    def whole_values(self, module: Module, part: Slice, name: str, depth: float) -> dict[str, Scalar | None]:
        """The parameters of the merge for one tensor.

        Args:
            module: Where it stands.
            part: The slice that it stands in.
            name: Its name in the output.
            depth: Where gradients are read.

        Raises:
            RecipeError: If one that must be given is not.
        """
        scopes = (part.parameters, module.parameters, self.parameters)
        return {
            key: _value(parameter, key, scopes, name, depth, f"{self.merge_method} for the tensor {name}")
            for key, parameter in self.grammar.whole.items()
        }

    def model_values(
        self, module: Module, part: Slice, source: Source, name: str, depth: float
    ) -> dict[str, Scalar | None]:
        """The parameters of one model for one tensor.

        Args:
            module: Where the tensor stands.
            part: The slice that it stands in.
            source: The model.
            name: The tensor's name in that model.
            depth: Where gradients are read.

        Raises:
            RecipeError: If one that must be given is not.
        """
        scopes = (source.parameters, part.parameters, module.parameters, self.parameters)
        is_base = self.grammar.base != "ignored" and source.model == self.base_of(part)
        return {
            key: _value(parameter, key, scopes, name, depth,
                        None if is_base else f"the tensor {name} of {source.model}")
            for key, parameter in self.grammar.per_model.items()
        }  # fmt: skip


def _value(
    parameter: Parameter, key: str, scopes: tuple[Parameters, ...], name: str, depth: float, needed_by: str | None
) -> Scalar | None:
    """The value of the innermost scope that has one.

    Args:
        parameter: What is looked for.
        key: Its name.
        scopes: Innermost first.
        name: The tensor's name that filters are matched with.
        depth: Where gradients are read.
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
