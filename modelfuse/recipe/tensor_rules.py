"""Rules: settings of methods for some tensors, or tensors that are taken from one input unchanged."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

from msgspec import Struct
from msgspec.structs import replace

from modelfuse.errors import RecipeError
from modelfuse.recipe.checks import nearest, shown
from modelfuse.recipe.hub_names import HubName
from modelfuse.recipe.method_settings import METHOD_SETTINGS, METHOD_SYNONYMS
from modelfuse.recipe.schema import Instead, InvalidValue, as_json, read_input
from modelfuse.storage import PathOrUrl

#: Keys of a rule besides settings of methods.
TENSORS, TAKE = "tensors", "take"


class Rule(Struct, frozen=True):
    """Settings for some tensors.

    Attributes:
        tensors: A glob over the names of the output's tensors.
        own: Its settings; the others are the recipe's.
        take: The input that the tensors are taken from unchanged: a path or name; or a number, from 1 on in a recipe,
            from 0 on after :meth:`among`. None: they are merged.
    """

    tensors: str
    own: tuple[tuple[str, object], ...]
    take: PathOrUrl | HubName | int | None = None

    def matcher(self) -> Callable[[str], object]:
        """A function that tells whether the rule applies to a tensor's name."""
        return re.compile(fnmatch.translate(self.tensors)).match

    def among(self, inputs: Sequence[PathOrUrl | HubName]) -> Rule:
        """The rule with the index of the input to take, from 0 on.

        Raises:
            RecipeError: If it is not among the inputs.
        """
        if self.take is None:
            return self
        names = "Name one of the models as model_path_list or base_model_path does, or by its number: 1 is the first."
        if not isinstance(self.take, int):
            if self.take in inputs:
                return replace(self, take=inputs.index(self.take))
            raise RecipeError(f"take is {self.take}, which is none of the models", names)
        if 1 <= self.take <= len(inputs):
            return replace(self, take=self.take - 1)
        raise RecipeError(f"take is {self.take}, but there are {len(inputs)} inputs", names)


def read_rule(value: object) -> Rule:
    """Parse one rule of a recipe.

    Raises:
        ValueError: If it is invalid; lists all problems.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"give a map with {TENSORS}, and settings of methods or {TAKE}")
    plain = ((key.replace("-", "_"), each) for key, each in value.items())
    given = {METHOD_SYNONYMS.get(key, key): each for key, each in plain}
    tensors, take = given.pop(TENSORS, None), given.pop(TAKE, None)
    own, problems = _read_settings(given)
    if len(given) + sum(name in value for name in (TENSORS, TAKE)) < len(value):
        problems.append("a setting is given twice")
    if not isinstance(tensors, str) or not tensors:
        problems.append(f'{TENSORS} should be a glob over names, such as "*.mlp.*"')
    if take is not None and own:
        problems.append(f"it has {TAKE}, and {', '.join(own)}: what is taken as it is has no method")
    elif take is None and not own and not problems:
        problems.append(f"it changes nothing: give settings of methods, or {TAKE}")
    try:
        take = _read_input(take)
    except ValueError as error:
        problems.append(f"{TAKE} is {shown(take)}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return Rule(str(tensors), tuple(own.items()), take)


def _read_settings(given: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """The valid settings of methods, and the problems of the others."""
    own, problems = dict[str, object](), list[str]()
    for name, each in given.items():
        if name not in METHOD_SETTINGS:
            close = nearest(name, (*METHOD_SETTINGS, TENSORS, TAKE))
            problems.append(f"there is no setting {name!r} of methods. {close}")
            continue
        try:
            own[name] = METHOD_SETTINGS[name].read(each)
        except InvalidValue as error:
            problems.append(f"{name} is {shown(error.value)}: {error.reason}")
    return own, problems


def _read_input(take: object) -> PathOrUrl | HubName | int | None:
    if isinstance(take, bool):
        raise ValueError("give a model's path or number")
    return take if take is None or isinstance(take, int) else read_input(take)


#: The type of one rule in a recipe.
RuleSetting = Annotated[Rule, Instead(read_rule)]


def checked_rules(
    rules: Sequence[Rule], inputs: Sequence[PathOrUrl | HubName], check: Callable[[Rule], None]
) -> tuple[Rule, ...]:
    """The checked rules, with the indices of their inputs.

    Args:
        rules: The given rules.
        inputs: The models in order, then the base if there is one.
        check: Checks the settings of a rule.

    Raises:
        RecipeError: If a rule is invalid; names it.
    """
    found = []
    for number, rule in enumerate(rules, 1):
        try:
            found.append(rule.among(inputs))
            check(rule)
        except RecipeError as error:
            raise RecipeError(f"Rule {number} ({rule.tensors!r}): {error.message}", error.hint) from None
    return tuple(found)


def rule_as_json(rule: Rule, inputs: Sequence[PathOrUrl | HubName], used: Mapping[str, object]) -> dict[str, object]:
    """An effective rule as JSON values; parsing it gives the same rule.

    Args:
        rule: The rule.
        inputs: The models in order, then the base if there is one.
        used: The settings that its method takes.
    """
    if isinstance(rule.take, int):
        return {TENSORS: rule.tensors, TAKE: as_json(inputs[rule.take])}
    return {TENSORS: rule.tensors, **used}
