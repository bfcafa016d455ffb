"""What is searched: a recipe with dimensions where numbers are to be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from modelfuse.errors import RecipeError
from modelfuse.recipe.files import dump_documents
from modelfuse.recipe.recipe import Recipe

#: The models of a recipe, which hub names become folders of.
INPUTS = ("model_path_list", "base_model_path", "tokenizer_from", "unmerged_from")


@dataclass(frozen=True, slots=True)
class Dimension:
    """A number that is searched.

    Attributes:
        name: What it is called in tables.
        low: The least it may be.
        high: The most.
        start: Where the search begins.
        log: Whether its logarithm is searched.
        whole: Whether it is a whole number.
        share: Whether it is a share of a norm, as ``lambda: norm 0.6`` is.
        model: The number of the model that it is a weight of, from 1 on; 0 if it is none.
    """

    name: str
    low: float
    high: float
    start: float
    log: bool = False
    whole: bool = False
    share: bool = False
    model: int = 0

    def value(self, number: float) -> float | int | str:
        """A number of it as the recipe has it."""
        return round(number) if self.whole else f"norm {number!r}" if self.share else number

    def from_unit(self, unit: float) -> float:
        """The number at a share of the way from the least to the most."""
        if self.log:
            number = math.exp(math.log(self.low) + unit * (math.log(self.high) - math.log(self.low)))
        else:
            number = self.low + unit * (self.high - self.low)
        return float(round(number)) if self.whole else min(max(number, self.low), self.high)

    def to_unit(self, number: float) -> float:
        """The share of the way that a number lies at."""
        if self.log:
            return (math.log(number) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (number - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Space:
    """A recipe with dimensions where numbers are to be.

    Attributes:
        tree: Its settings; of a configuration of mergekit's, its documents as ``mergekit``.
        pinned: Settings that hold whatever is searched.
        left_out: Dimensions that stay at their start.
    """

    tree: Mapping[str, object]
    pinned: Mapping[str, object] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """All that is searched."""
        return tuple(each for each in dict.fromkeys(dimensions_in(self.tree)) if each.name not in self.left_out)

    @property
    def start(self) -> dict[str, float]:
        """Where the search begins."""
        return {each.name: each.start for each in self.dimensions}

    def settings(self, numbers: Mapping[str, float]) -> dict[str, object]:
        """The settings for a number of each dimension."""
        filled = {name: _filled(value, numbers) for name, value in self.tree.items()}
        if isinstance(documents := filled.get("mergekit"), list):
            filled["mergekit"] = dump_documents(documents)
        return {**filled, **self.pinned}

    def recipe(self, numbers: Mapping[str, float], **changes: object) -> Recipe:
        """The same as a recipe.

        Raises:
            RecipeError: If the numbers, together, are none that a merge takes.
        """
        return Recipe.parse({**self.settings(numbers), **changes})

    def at_hand(self, recipe: Recipe) -> Space:
        """The same with the models where they were found."""
        own = {name: getattr(recipe, name) for name in INPUTS if getattr(recipe, name) is not None}
        if recipe.mergekit is not None:
            own.pop("base_model_path", None)
        if recipe.tokenizer is not None:
            own.pop("tokenizer_from", None)
        return replace(self, pinned={**self.pinned, **own})

    def check(self) -> None:
        """Refuse ranges whose ends no merge takes.

        Raises:
            RecipeError: Naming the dimension.
        """
        for each in self.dimensions:
            for end in (each.low, each.high):
                try:
                    self.recipe({**self.start, each.name: end})
                except RecipeError as error:
                    if "weight" in each.name:  # One of several may be zero.
                        continue
                    raise RecipeError(f"{each.name} is searched up to {end:g}: {error.message}", error.hint) from None


def weights_of(name: str, models: int, low: float, high: float, start: Sequence[float] | None) -> list[Dimension]:
    """One weight a model, as dimensions."""
    starts = start or [1 / models if low <= 1 / models <= high else (low + high) / 2] * models
    return [
        Dimension(f"{name} {number}", min(low, first), max(high, first), first, model=number)
        for number, first in enumerate(starts, 1)
    ]


def dimensions_in(value: object) -> Iterator[Dimension]:
    """All dimensions in a part of a recipe, as often as they are there."""
    if isinstance(value, Dimension):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from dimensions_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from dimensions_in(each)


def _filled(value: object, numbers: Mapping[str, float]) -> object:
    if isinstance(value, Dimension):
        return value.value(numbers.get(value.name, value.start))
    if isinstance(value, Mapping):
        return {key: _filled(each, numbers) for key, each in value.items()}
    return [_filled(each, numbers) for each in value] if isinstance(value, list | tuple) else value
