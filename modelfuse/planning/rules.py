"""The method, parameters and sources of each output tensor, by the recipe's settings and rules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from modelfuse.checkpoints import Checkpoint
from modelfuse.dtypes import OUTPUT_DTYPES
from modelfuse.errors import RecipeError
from modelfuse.methods.applied import Applied
from modelfuse.methods.linear import LINEAR
from modelfuse.methods.registry import apply
from modelfuse.planning.operations import Operation, merged, taken
from modelfuse.recipe.method_settings import STEPS
from modelfuse.recipe.recipe import Recipe

if TYPE_CHECKING:
    from modelfuse.planning.matrix_methods import MatrixMethods

#: The smallest absolute sum of weights for a weighted mean.
LEAST_SUM = 1e-8


class Rules:
    """Finds the rule that applies to a tensor: the first whose glob matches its name.

    Args:
        recipe: The settings.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._matchers = [rule.matcher() for rule in recipe.rules]
        self._inputs = tuple(range(len(recipe.inputs)))
        self._methods: dict[tuple[int | None, tuple[int, ...]], Applied] = {}
        #: Notes on tensors that were split into matrices or averaged, from :func:`operations_of`.
        self.matrix_notes: tuple[str, ...] = ()
        self._means: dict[tuple[int | None, tuple[int, ...]], Applied] = {}

    def of(self, name: str) -> int | None:
        """The index of the rule that applies to a tensor, from 0 on; None if none does."""
        for number, matches in enumerate(self._matchers):
            if matches(name):
                return number
        return None

    def input_to_take(self, rule: int | None) -> int | None:
        """The index of the input that a rule takes tensors from unchanged; None if it merges them."""
        take = None if rule is None else self._recipe.rules[rule].take
        return take if isinstance(take, int) else None

    def inputs_of(self, name: str) -> tuple[int, ...]:
        """The indices of the inputs that must have a tensor."""
        take = self.input_to_take(self.of(name))
        return self._inputs if take is None else (take,)

    def notes(self, names: Sequence[str]) -> Iterator[str]:
        """Notes on rules that apply to no tensor, with the reason, and ``matrix_notes``.

        Args:
            names: The names of the output's tensors, or of the base's if the output is an adapter.
        """
        took = {self.of(name) for name in names} if self._matchers else set()
        for number, (rule, matches) in enumerate(zip(self._recipe.rules, self._matchers, strict=True)):
            if number not in took:
                meant = sum(matches(name) is not None for name in names)
                why = f"earlier rules apply to all {meant} that it matches" if meant else "no name matches"
                yield f"Rule {number + 1} ({rule.tensors!r}) applies to no tensor: {why}."
        yield from self.matrix_notes

    def method(self, rule: int | None, models: tuple[int, ...]) -> Applied:
        """The method of a rule (None: of the recipe) for some of the models, by their indices."""
        key = rule, models
        if key not in self._methods:
            recipe = self._recipe
            parameters = recipe.parameters if rule is None else recipe.parameters_of(recipe.rules[rule])
            self._methods[key] = parameters.applied(models, recipe.seed)
        return self._methods[key]

    def mean(self, rule: int | None, models: tuple[int, ...]) -> Applied:
        """The weighted mean, which whole-matrix methods use for tensors that are not matrices of layers.

        Raises:
            RecipeError: If the weights sum to zero.
        """
        key = rule, models
        if key not in self._means:
            method = self.method(rule, models)
            whole = math.fsum(method.weights)
            if abs(whole) < LEAST_SUM:
                raise RecipeError(
                    f"{method.merge_type} averages tensors that are not matrices, but weight_list sums to zero",
                    "Give those tensors another method in a rule, or give other weights.",
                )
            weights = [weight / whole for weight in method.weights]
            self._means[key] = apply(None, LINEAR, weights, {}, seed=method.seed, streams=models)
        return self._means[key]

    def names_method(self, rule: int | None) -> bool:
        """Whether a rule gives the method itself, instead of only settings of the recipe's method."""
        return rule is not None and bool({*STEPS} & {name for name, _ in self._recipe.rules[rule].own})


def operations_of(
    recipe: Recipe,
    rules: Rules,
    models: Sequence[Checkpoint],
    names: Sequence[str],
    partial: Mapping[str, tuple[int, ...]] | None = None,
) -> list[Operation]:
    """The operations of a full model's tensors.

    Args:
        recipe: The settings.
        rules: Its rules; their ``matrix_notes`` are set.
        models: The models in order, then the base if there is one.
        names: The names of the output's tensors.
        partial: For tensors that not all models have, the indices of the inputs to use.

    Raises:
        MismatchError: If Gram matrices are missing or have another shape.
        RecipeError: If ``unmerged_from`` is not among the models.
    """
    builder = _OperationBuilder(recipe, rules, models)
    operations = [builder.operation(name, partial.get(name) if partial else None) for name in names]
    rules.matrix_notes = builder.matrix_notes()
    return operations


class _OperationBuilder:
    """Builds the operations of tensors that have the same name in all models."""

    def __init__(self, recipe: Recipe, rules: Rules, models: Sequence[Checkpoint]) -> None:
        self._recipe, self._rules, self._has_base = recipe, rules, recipe.has_base
        self._preferred = preferred_input(recipe)
        self._dtype = OUTPUT_DTYPES[recipe.output_dtype] if recipe.output_dtype else None
        self._inputs = tuple(range(len(models)))
        self._merged_inputs = self._inputs[:-1] if self._has_base else self._inputs
        self._contents = [(model.tensors, model.aliases) for model in models]
        self._models = models
        self._whole: MatrixMethods | None = self._matrix_methods() if recipe.gram_list else None

    def operation(self, name: str, partial: tuple[int, ...] | None) -> Operation:
        """The operation of one tensor; ``partial`` are the inputs to use if not all models have it."""
        rule = self._rules.of(name)
        take = self._rules.input_to_take(rule)
        if take is not None:
            return self._taken(name, rule, take)
        if partial is not None:
            return self._merged_partially(name, rule, partial)
        sources = tuple([tensors[aliases.get(name, name)] for tensors, aliases in self._contents])
        method, matrices = self._rules.method(rule, self._merged_inputs), None
        if method.combination.matrix is not None:
            self._whole = self._whole or self._matrix_methods()
            matrices = self._whole.matrices(name, sources, method, self._rules.names_method(rule))
            method = method if matrices is not None else self._rules.mean(rule, self._merged_inputs)
        return merged(
            name, sources, self._inputs, method,
            has_base=self._has_base, dtype=self._dtype, preferred=self._preferred, rule=rule, matrices=matrices,
        )  # fmt: skip

    def _taken(self, name: str, rule: int | None, take: int) -> Operation:
        source = self._models[take].resolve(name)
        base = self._models[-1].resolve(name) if source.is_delta else None  # A difference implies that there is a base.
        return taken(name, source, take, base=base, base_input=self._inputs[-1], dtype=self._dtype, rule=rule)

    def _merged_partially(self, name: str, rule: int | None, inputs: tuple[int, ...]) -> Operation:
        sources = tuple([self._models[number].resolve(name) for number in inputs])
        if len(inputs) == 1:
            return taken(name, sources[0], inputs[0], dtype=self._dtype, rule=rule)
        method = self._rules.method(rule, inputs)
        method = method if method.combination.matrix is None else self._rules.mean(rule, inputs)
        return merged(
            name, sources, inputs, method, has_base=False, dtype=self._dtype, preferred=self._preferred, rule=rule
        )

    def _matrix_methods(self) -> MatrixMethods:
        from modelfuse.planning.matrix_methods import MatrixMethods  # Only some merges need it.

        return MatrixMethods(self._recipe, self._models)

    def matrix_notes(self) -> tuple[str, ...]:
        """Notes on tensors that whole-matrix methods average or do not split, and on Gram matrices.

        Raises:
            MismatchError: If Gram matrices are missing or have another shape.
        """
        return () if self._whole is None else tuple(self._whole.notes())


def preferred_input(recipe: Recipe) -> int | None:
    """The index of the input that ``unmerged_from`` names, None if it is not given.

    Raises:
        RecipeError: If it is not among the inputs.
    """
    if recipe.unmerged_from is None:
        return None
    try:
        return recipe.inputs.index(recipe.unmerged_from)
    except ValueError:
        raise RecipeError(
            f"unmerged_from is {recipe.unmerged_from}, which is none of the models", "Name one of the models' paths."
        ) from None
