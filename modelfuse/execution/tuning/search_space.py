"""The search space: a recipe in which some numbers are dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from modelfuse.errors import RecipeError
from modelfuse.recipe.files import dump_documents
from modelfuse.recipe.recipe import Recipe

#: Settings that name models; hub names among them are replaced by folders before the search.
INPUTS = ("model_path_list", "base_model_path", "tokenizer_from", "unmerged_from")


@dataclass(frozen=True, slots=True)
class Dimension:
    """A number that is searched.

    Attributes:
        name: Its name in tables.
        low: The lower end of its range.
        high: The upper end of its range.
        start: Its value in the first trial.
        log: Whether it is searched on a logarithmic scale.
        whole: Whether it is an integer.
        share: Whether it is a share of a norm, as in ``lambda: norm 0.6``.
        model: The number of the model that it is a weight of, from 1 on; 0 if it is not a weight.
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
        """The setting of a recipe for a number of this dimension."""
        return round(number) if self.whole else f"norm {number!r}" if self.share else number

    def from_unit(self, unit: float) -> float:
        """The number at a position in the range, from 0 for ``low`` to 1 for ``high``."""
        if self.log:
            number = math.exp(math.log(self.low) + unit * (math.log(self.high) - math.log(self.low)))
        else:
            number = self.low + unit * (self.high - self.low)
        return float(round(number)) if self.whole else min(max(number, self.low), self.high)

    def to_unit(self, number: float) -> float:
        """The position of a number in the range, from 0 for ``low`` to 1 for ``high``."""
        if self.log:
            return (math.log(number) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (number - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Space:
    """A recipe in which some numbers are dimensions.

    Attributes:
        tree: The settings; for a mergekit configuration, ``mergekit`` has its parsed documents.
        pinned: Settings that override those of ``tree``.
        left_out: Names of dimensions that are not searched and keep their start.
    """

    tree: Mapping[str, object]
    pinned: Mapping[str, object] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """All dimensions that are searched, in the order of the recipe."""
        return tuple(each for each in dict.fromkeys(dimensions_in(self.tree)) if each.name not in self.left_out)

    @property
    def start(self) -> dict[str, float]:
        """The point of the first trial."""
        return {each.name: each.start for each in self.dimensions}

    def settings(self, numbers: Mapping[str, float]) -> dict[str, object]:
        """The settings at a point: a number for each dimension, by name."""
        filled = {name: _filled(value, numbers) for name, value in self.tree.items()}
        if isinstance(documents := filled.get("mergekit"), list):
            filled["mergekit"] = dump_documents(documents)
        return {**filled, **self.pinned}

    def recipe(self, numbers: Mapping[str, float], **changes: object) -> Recipe:
        """The recipe at a point, with further settings changed.

        Raises:
            RecipeError: If this combination of settings is invalid.
        """
        return Recipe.parse({**self.settings(numbers), **changes})

    def with_inputs(self, recipe: Recipe) -> Space:
        """A copy with the models of this recipe, in which hub names were replaced by folders."""
        own = {name: getattr(recipe, name) for name in INPUTS if getattr(recipe, name) is not None}
        if recipe.mergekit is not None:
            own.pop("base_model_path", None)
        if recipe.tokenizer is not None:
            own.pop("tokenizer_from", None)
        return replace(self, pinned={**self.pinned, **own})

    def check(self) -> None:
        """Check that the ends of all ranges are valid settings.

        Raises:
            RecipeError: If one is not, with the name of the dimension.
        """
        for each in self.dimensions:
            for end in (each.low, each.high):
                try:
                    self.recipe({**self.start, each.name: end})
                except RecipeError as error:
                    if "weight" in each.name:  # Only this end may be invalid, as all weights are zero there.
                        continue
                    raise RecipeError(f"{each.name} is searched up to {end:g}: {error.message}", error.hint) from None


def weights_of(name: str, models: int, low: float, high: float, start: Sequence[float] | None) -> list[Dimension]:
    """A dimension for the weight of each model, within ``low`` to ``high`` extended to its start."""
    starts = start or [1 / models if low <= 1 / models <= high else (low + high) / 2] * models
    return [
        Dimension(f"{name} {number}", min(low, first), max(high, first), first, model=number)
        for number, first in enumerate(starts, 1)
    ]


def dimensions_in(value: object) -> Iterator[Dimension]:
    """All dimensions in a part of a recipe, with repetitions."""
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
