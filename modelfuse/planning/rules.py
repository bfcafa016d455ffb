"""What a recipe means for each tensor of the output: its method, its parameters and its sources."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from modelfuse.checkpoints import Checkpoint
from modelfuse.checkpoints.adapters.core_space import in_core
from modelfuse.dtypes import OUTPUT_DTYPES
from modelfuse.errors import RecipeError
from modelfuse.methods.applied import Applied
from modelfuse.methods.linear import LINEAR
from modelfuse.methods.registry import apply
from modelfuse.planning.input_grams import GivenGrams
from modelfuse.planning.operations import Operation, can_be_merged, merged, taken
from modelfuse.planning.whole_matrices import Cuts
from modelfuse.recipe.method_settings import STEPS
from modelfuse.recipe.recipe import Recipe

#: Weights whose sum is nearer to zero have no mean.
LEAST_SUM = 1e-8


class Rules:
    """Finds the rule that holds for a tensor: the first whose glob matches its name.

    Args:
        recipe: The settings.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._matchers = [rule.matcher() for rule in recipe.rules]
        self._inputs = tuple(range(len(recipe.inputs)))
        self._methods: dict[tuple[int | None, tuple[int, ...]], Applied] = {}
        #: What is to be told of the tensors that were cut into matrices, and of those that are none.
        self.told: tuple[str, ...] = ()
        self._means: dict[tuple[int | None, tuple[int, ...]], Applied] = {}

    def of(self, name: str) -> int | None:
        """The number of the rule that holds for a tensor of the output, from 0 on; None if none does."""
        for number, matches in enumerate(self._matchers):
            if matches(name):
                return number
        return None

    def input_to_take(self, rule: int | None) -> int | None:
        """The number of the input that a rule takes tensors from as they are; None if it merges."""
        take = None if rule is None else self._recipe.rules[rule].take
        return take if isinstance(take, int) else None

    def inputs_of(self, name: str) -> tuple[int, ...]:
        """The numbers of the inputs that must have a tensor."""
        take = self.input_to_take(self.of(name))
        return self._inputs if take is None else (take,)

    def notes(self, names: Sequence[str]) -> Iterator[str]:
        """Which rules hold for none of the output's tensors, and why; what methods of whole matrices do otherwise.

        Args:
            names: The output's tensors; where it is an adapter, the base's.
        """
        took = {self.of(name) for name in names} if self._matchers else set()
        for number, (rule, matches) in enumerate(zip(self._recipe.rules, self._matchers, strict=True)):
            if number not in took:
                meant = sum(matches(name) is not None for name in names)
                why = f"the rules before it hold for all {meant} that it matches" if meant else "no name matches"
                yield f"Rule {number + 1} ({rule.tensors!r}) takes no tensor: {why}."
        yield from self.told

    def method(self, rule: int | None, models: tuple[int, ...]) -> Applied:
        """What merges some of the models, by their numbers, where a rule holds."""
        key = rule, models
        if key not in self._methods:
            recipe = self._recipe
            parameters = recipe.parameters if rule is None else recipe.parameters_of(recipe.rules[rule])
            self._methods[key] = parameters.applied(models, recipe.seed)
        return self._methods[key]

    def mean(self, rule: int | None, models: tuple[int, ...]) -> Applied:
        """The weighted mean, for what is no matrix where the method works on whole ones.

        Raises:
            RecipeError: If the weights have none.
        """
        key = rule, models
        if key not in self._means:
            method = self.method(rule, models)
            whole = math.fsum(method.weights)
            if abs(whole) < LEAST_SUM:
                raise RecipeError(
                    f"{method.merge_type} takes the weighted mean of tensors that are no matrices, "
                    "but weight_list sums to zero",
                    "Have a rule merge or take those tensors, or give other weights.",
                )
            weights = [weight / whole for weight in method.weights]
            self._means[key] = apply(None, LINEAR, weights, {}, seed=method.seed, streams=models)
        return self._means[key]

    def names_method(self, rule: int | None) -> bool:
        """Whether a rule itself says which method it is."""
        return rule is not None and bool({*STEPS} & {name for name, _ in self._recipe.rules[rule].own})


def operations_of(
    recipe: Recipe,
    rules: Rules,
    models: Sequence[Checkpoint],
    names: Sequence[str],
    partial: Mapping[str, tuple[int, ...]] | None = None,
) -> list[Operation]:
    """How each tensor of a full model is made.

    Args:
        recipe: The settings.
        rules: Its rules.
        models: The models in order, then the base if there is one.
        names: The output's tensors.
        partial: For those that not all models have, the inputs that they are made of.

    Raises:
        RecipeError: If ``unmerged_from`` is none of the models.
    """
    has_base = recipe.has_base
    preferred = _preferred_input(recipe)
    dtype = OUTPUT_DTYPES[recipe.output_dtype] if recipe.output_dtype else None
    inputs = tuple(range(len(models)))
    merging = inputs[:-1] if has_base else inputs
    found = [(model.tensors, model.aliases) for model in models]
    grams = GivenGrams(recipe)
    cuts = Cuts((models[recipe.reference], *models), recipe.output_layout or models[recipe.reference].layout)
    operations = []
    for name in names:
        rule = rules.of(name)
        take = rules.input_to_take(rule)
        own = partial.get(name) if partial else None
        if take is None and own is not None:
            sources = tuple([found[number][0][found[number][1].get(name, name)] for number in own])
            if len(own) == 1:
                operation = taken(name, sources[0], own[0], dtype=dtype, rule=rule)
            else:
                method = rules.method(rule, own)
                method = method if method.combination.matrix is None else rules.mean(rule, own)
                operation = merged(
                    name, sources, own, method, has_base=False, dtype=dtype, preferred=preferred, rule=rule
                )
        elif take is None:
            sources = tuple([tensors[aliases.get(name, name)] for tensors, aliases in found])
            method, matrices = rules.method(rule, merging), None
            if method.combination.matrix is not None:
                if can_be_merged(name, sources[-1]):
                    matrices = cuts.of(name, sources[-1].shape, rules.names_method(rule))
                    matrices = grams.with_grams(matrices, name, sources, method)
                    if has_base and any(source.is_delta for source in sources):
                        strict = recipe.on_nonfinite == "error"
                        matrices = in_core(name, sources[:-1], sources[-1], method, matrices, strict)
                method = method if matrices is not None else rules.mean(rule, merging)
            operation = merged(
                name, sources, inputs, method,
                has_base=has_base, dtype=dtype, preferred=preferred, rule=rule, matrices=matrices,
            )  # fmt: skip
        else:
            tensors, aliases = found[take]
            source = tensors[aliases.get(name, name)]
            tensors, aliases = found[-1]
            base = tensors[aliases.get(name, name)] if source.is_delta else None  # Of an adapter, there is one.
            operation = taken(name, source, take, base=base, base_input=inputs[-1], dtype=dtype, rule=rule)
        operations.append(operation)
    grams.check()
    rules.told = (*grams.notes(), *cuts.notes())
    return operations


def _preferred_input(recipe: Recipe) -> int | None:
    if recipe.unmerged_from is None:
        return None
    try:
        return recipe.inputs.index(recipe.unmerged_from)
    except ValueError:
        raise RecipeError(
            f"unmerged_from is {recipe.unmerged_from}, which is none of the models", "Name one of the models' paths."
        ) from None
