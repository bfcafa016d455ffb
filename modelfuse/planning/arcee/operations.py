"""The operations of a mergekit configuration: sources, method and dtype of every output tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.tensor_names import HEADS, group_names
from modelfuse.dtypes import F32, F64, OUTPUT_DTYPES, DType
from modelfuse.errors import MismatchError, RecipeError
from modelfuse.methods import arcee
from modelfuse.methods.applied import Applied
from modelfuse.methods.registry import TAKE
from modelfuse.planning.arcee.models import OpenModel
from modelfuse.planning.arcee.tensors import Arrangement, Slot
from modelfuse.planning.arcee.vocabulary import Vocabulary, truncated
from modelfuse.planning.matching import Tied
from modelfuse.planning.operations import Operation, can_be_merged, merged, taken
from modelfuse.planning.rules import preferred_input
from modelfuse.recipe.arcee.configuration import Configuration
from modelfuse.recipe.arcee.references import Reference
from modelfuse.recipe.missing import policy_of
from modelfuse.recipe.recipe import Recipe

#: Parameters by name; None if one is not given.
Values = Mapping[str, float | int | bool | None]

HINT = "Choose layers with slices:, a vocabulary with tokenizer:, or use --missing copy or drop for missing tensors."


@dataclass
class OperationBuilder:
    """Builds the operations of a configuration.

    Attributes:
        recipe: The other settings.
        configuration: The mergekit configuration.
        models: Its models.
        vocabulary: Rearranges rows of embeddings and heads; None: they stay as they are.
        tied: Names that the output leaves out because they share another tensor's values.
        dropped: Names that the output leaves out because only some models have them.
        problems: Descriptions of mismatches.
    """

    recipe: Recipe
    configuration: Configuration
    models: Mapping[Reference, OpenModel]
    vocabulary: Vocabulary | None
    tied: list[Tied] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _missing: dict[str, list[str]] = field(default_factory=dict)
    _methods: dict[object, Applied] = field(default_factory=dict)

    def build(self, arrangement: Arrangement) -> list[Operation]:
        """Build the operations of all tensors.

        Raises:
            MismatchError: If the models do not fit together; lists all problems.
            RecipeError: If a parameter is missing or invalid.
        """
        found = [operation for slot in arrangement.slots for operation in self._of(slot)]
        for where, names in self._missing.items():
            self.problems += [f"not in {where}: {group}" for group in group_names(names)]
        if self.problems:
            lines = "\n".join(f"  {problem}" for problem in dict.fromkeys(self.problems))
            raise MismatchError(f"The models do not have the same tensors:\n{lines}", HINT)
        if not found:
            raise MismatchError("The models have no tensors to merge", "Name the folders that hold the weights.")
        return found

    def _of(self, slot: Slot) -> Iterator[Operation]:
        models = [self.models[source.model] for source in slot.sources]
        if self._is_tied(slot, models):
            return
        tensors = [model.find(name) for model, name in zip(models, slot.names, strict=True)]
        if absent := [str(model.reference) for model, tensor in zip(models, tensors, strict=True) if tensor is None]:
            yield from self._of_some(slot, absent, [number for number, each in enumerate(tensors) if each is not None])
            return
        whole = [tensor for tensor in tensors if tensor is not None]
        if self.vocabulary is not None:
            whole = self.vocabulary.rearranged(slot, whole)
        elif self.recipe.truncate_embeddings:
            whole = truncated(slot.name, whole)
        if self._fits(slot, whole):
            yield self._operation(slot, models, whole)

    def _of_some(self, slot: Slot, absent: Sequence[str], places: Sequence[int]) -> Iterator[Operation]:
        """The operation of a tensor that only some models have, by the recipe's ``missing``."""
        policy = policy_of(self.recipe.missing, slot.name)
        sources = tuple(slot.sources[place] for place in places)
        base, (fewest, _) = self.configuration.base_of(slot.part), self.configuration.grammar.models
        has_base = self.configuration.grammar.base != "required" or any(each.model == base for each in sources)
        if policy == "drop":
            self.dropped.append(slot.name)
        elif policy == "copy" and len(sources) == 1:
            model = self.models[sources[0].model]
            found = model.find(slot.names[places[0]])
            assert found is not None
            yield taken(slot.name, found, model.number, dtype=self._dtype([found]))
        elif policy == "copy" and has_base and len(sources) >= fewest:
            part = replace(slot.part, sources=sources)
            yield from self._of(replace(slot, part=part, names=tuple(slot.names[place] for place in places)))
        else:
            self._missing.setdefault(" and ".join(absent), []).append(slot.name)

    def _is_tied(self, slot: Slot, models: Sequence[OpenModel]) -> bool:
        """Whether the slot is a head that all models tie to the same embedding, so that it is left out."""
        if not slot.name.endswith(HEADS) or not all(model.is_tied for model in models):
            return False
        embedding = models[0].embedding
        if embedding is None or not all(model.embedding == embedding for model in models):
            return False
        self.tied.append(Tied(slot.name, embedding))
        return True

    def _fits(self, slot: Slot, tensors: list[StoredTensor]) -> bool:
        """Whether all tensors have the same shape; else a problem is added."""
        if len({tensor.shape for tensor in tensors}) > 1:
            shown = ", ".join(f"{list(tensor.shape)} in {source.model}"
                              for tensor, source in zip(tensors, slot.sources, strict=True))  # fmt: skip
            self.problems.append(f"{slot.name} has the shapes {shown}")
            return False
        return True

    def _operation(self, slot: Slot, models: Sequence[OpenModel], tensors: Sequence[StoredTensor]) -> Operation:
        base = self.configuration.base_of(slot.part)
        order, has_base = self._order(slot, base)
        sources = [tensors[place] for place in order]
        for number, place in enumerate(order[:-1] if has_base else ()):
            delta = models[place].delta(slot.names[place], base)
            if delta is not None and sources[number] is models[place].find(slot.names[place]):
                sources[number] = delta
        inputs = tuple(models[place].number for place in order)
        if not can_be_merged(slot.name, sources[-1]):
            preferred = preferred_input(self.recipe)
            return merged(slot.name, tuple(sources), inputs, TAKE, has_base=False, preferred=preferred)
        if has_base and len(order) == 1:
            return taken(slot.name, sources[0], inputs[0], dtype=self._dtype(tensors))
        method = self._method(slot, order[:-1] if has_base else order, inputs)
        return merged(slot.name, tuple(sources), inputs, method, has_base=has_base, dtype=self._dtype(tensors))

    def _order(self, slot: Slot, base: Reference | None) -> tuple[list[int], bool]:
        """The positions of the sources in the order that methods expect, and whether the last one is the base."""
        grammar = self.configuration.grammar
        places = list(range(len(slot.sources)))
        at = next((place for place in places if slot.sources[place].model == base), None)
        if at is None or grammar.base == "ignored":
            return places, False
        others = [place for place in places if place != at]
        if grammar.counts_base:
            return [at, *others], False
        return [*others, at], True

    def _method(self, slot: Slot, order: Sequence[int], inputs: Sequence[int]) -> Applied:
        configuration = self.configuration
        whole = configuration.whole_values(slot.module, slot.part, slot.name, slot.depth)
        each: list[Values] = [
            configuration.model_values(slot.module, slot.part, slot.sources[place], slot.names[place], slot.depth)
            for place in order
        ]
        streams = inputs[: len(order)]
        key = tuple(whole.values()), tuple(tuple(values.values()) for values in each), tuple(streams)
        if key not in self._methods:
            self._methods[key] = _applied(configuration.merge_method, each, whole, self.recipe.seed, streams)
        return self._methods[key]

    def _dtype(self, tensors: Sequence[StoredTensor]) -> DType:
        """The dtype to store: as configured, else the widest of the sources."""
        named = self.recipe.output_dtype or self.configuration.out_dtype or self.configuration.dtype
        if named is not None:
            return OUTPUT_DTYPES[named]
        kinds = list(dict.fromkeys(tensor.natural for tensor in tensors))
        return kinds[0] if len(kinds) == 1 else F64 if F64 in kinds else F32


def _applied(name: str, each: Sequence[Values], whole: Values, seed: int, streams: Sequence[int]) -> Applied:
    """A mergekit method with its parameters.

    Args:
        name: The method's name in mergekit.
        each: The parameters of every model, without the base if differences to it are merged.
        whole: The parameters of the merge.
        seed: The seed of random draws.
        streams: The index of each model, which its random draws depend on.

    Raises:
        RecipeError: If a parameter is invalid.
    """
    try:
        return arcee.applied(name, each, whole, seed=seed, streams=streams)
    except ValueError as error:
        raise RecipeError(str(error), "Change the parameters of the models in the message.") from error
