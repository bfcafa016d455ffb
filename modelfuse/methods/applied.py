"""A method with all its settings, as the merge of one tensor needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any, TypeVar

from modelfuse.methods.expressions import Expression, array, number, numbers_of, total, uses
from modelfuse.methods.spec import (
    Combination,
    Divergence,
    Gram,
    LineRanks,
    OrderStatistics,
    Ranks,
    Sparsifier,
    Step,
    Sums,
    Value,
)

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Chain:
    """The expressions of a sparsifier and a combination, for given switches and choices.

    Attributes:
        element: The element step, for one model's element; None: there is none.
        combine: The combination, for all models' elements.
        terms: Terms of each model's elements that are summed over the tensor before the element step.
        lined: Whether ``keep`` depends on ranks within lines, not within the tensor.
    """

    element: Expression | None
    combine: Expression
    terms: tuple[Expression, ...] = ()
    lined: bool = False

    @cached_property
    def element_numbers(self) -> tuple[str, ...]:
        """The names of the numbers in the element step, of which each model has its own."""
        return numbers_of(self.element, each=True)

    @cached_property
    def each_numbers(self) -> tuple[str, ...]:
        """The names of the combination's numbers that each model has its own of, including ``weight``."""
        return numbers_of(self.combine, each=True)

    @cached_property
    def shared_numbers(self) -> tuple[str, ...]:
        """The names of the combination's numbers that all models share."""
        return numbers_of(self.combine, each=False)

    @cached_property
    def draws(self) -> bool:
        """Whether the element step uses random draws."""
        return uses(self.element, "draw")

    @cached_property
    def keeps(self) -> bool:
        """Whether the element step uses a probability that depends on the rank."""
        return uses(self.element, "keep")

    @property
    def looks_up(self) -> bool:
        """Whether that probability is looked up by the magnitude."""
        return self.keeps and not self.lined

    @cached_property
    def text(self) -> str:
        """The expressions as text, which identifies the chain."""
        return f"{self.element} -> {self.combine}"


class _Names(SimpleNamespace):
    """A namespace of symbolic elements and numbers, passed to a declaration's functions."""

    def __init__(self, each: bool, known: Mapping[str, object]) -> None:
        super().__init__(**known)
        self._each = each

    def __getattr__(self, name: str) -> Expression:
        if name.startswith("_"):
            raise AttributeError(name)
        return number(name, each=self._each)


@lru_cache(maxsize=1024)
def _trace(
    function: Callable[[Any], T], merged: bool, static: tuple[tuple[str, Value], ...], lined: tuple[str, ...]
) -> T:
    """Trace a declaration's function: call it with symbolic elements and numbers.

    Args:
        function: The function of a sparsifier or, with ``merged``, of a combination.
        merged: Whether the function gets all models' elements, after the element step.
        static: The values of switches and choices.
        lined: The names of numbers that each line has its own of.
    """
    known: dict[str, object] = dict(static)
    if merged:
        known |= {"x": array("x"), "base": array("base", each=False), "weight": number("weight")}
    else:
        known |= {"x": array("x"), "draw": array("draw", kind="single"), "keep": array("keep")}
    return function(_Names(not merged, {**known, **{name: array(name) for name in lined}}))


@dataclass(frozen=True)
class Applied:
    """A method with all its settings, as the merge of one tensor needs it.

    Attributes:
        combination: Combines the models' tensors.
        sparsifier: Acts on each model first; None: there is none.
        weights: One weight per model.
        settings: The settings of both, by name; a tuple with one value per model for those that differ by model.
        seed: The seed of all random draws.
        streams: Each model's index in the recipe, which its draws depend on; empty: 0, 1, 2, …
        factor: λ, which multiplies the merged difference (without a base: the merged tensor).
        norm: For whole-matrix methods: each merged matrix is scaled so that its norm is this share of that of the sum
            of the differences, with weights scaled to a mean of 1. None: no scaling.
    """

    combination: Combination
    sparsifier: Sparsifier | None
    weights: tuple[float, ...]
    settings: tuple[tuple[str, Value | tuple[Value, ...]], ...] = ()
    seed: int = 0
    streams: tuple[int, ...] = ()
    factor: float = 1.0
    norm: float | None = None
    _cache: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __reduce__(self) -> tuple[object, ...]:
        return Applied, tuple(getattr(self, each.name) for each in fields(self) if each.init)

    @property
    def merge_type(self) -> str:
        """The combination's name."""
        return self.combination.name

    @property
    def sparsify_type(self) -> str | None:
        """The sparsifier's name, if there is one."""
        return self.sparsifier.name if self.sparsifier else None

    @property
    def chain(self) -> Chain:
        """The expressions to evaluate."""
        if "chain" not in self._cache:
            element = self.traced(self.sparsifier.element, merged=False) if self.sparsifier is not None else None
            sums = [each for each in self._needed(self.sparsifier) if isinstance(each, Sums)]
            terms = [term for each in sums for term in self.traced(each.terms, merged=False)]
            lined = any(isinstance(each, LineRanks) for each in self._needed(self.sparsifier))
            combine = self.traced(self.combination.combine, merged=True)
            self._cache["chain"] = Chain(element, combine, tuple(terms), lined)
        chain: Chain = self._cache["chain"]
        return chain

    def traced(self, function: Callable[[Any], T], *, merged: bool) -> T:
        """Trace a declaration's function with the switches and choices of these settings."""
        parameters = (*self.combination.parameters, *(self.sparsifier.parameters if self.sparsifier else ()))
        static = {each.name for each in parameters if each.is_static}
        known = tuple((name, value) for name, value in self.settings if name in static and not isinstance(value, tuple))
        lined = []
        for each in self._needed(self.combination) if merged else ():
            if isinstance(each, Divergence):
                lined.append("divergence")
            elif isinstance(each, Gram) and each.axis(self.shared) is not None:
                lined.append("weight")
        traced: T = _trace(function, merged, known, tuple(lined))
        return traced

    def _needed(self, step: Step | None) -> list[Any]:
        """The measures of a step that these settings need, in order."""
        known = self._cache.setdefault("measures", {})
        if step not in known:
            measures = step.measures if isinstance(step, Sparsifier | Combination) else ()
            known[step] = [each for each in measures if each.needed(self.shared)]
        found: list[Any] = known[step]
        return found

    @property
    def element_measures(self) -> list[OrderStatistics | Ranks | LineRanks | Sums]:
        """The measures before the element step, in order."""
        return self._needed(self.sparsifier)

    @property
    def merged_measures(self) -> list[Gram | Sums | OrderStatistics | Divergence]:
        """The measures after the element step, in order."""
        return self._needed(self.combination)

    @property
    def by_arrays(self) -> bool:
        """Whether every backend needs array operations: dot products along lines have no compiled loops."""
        grams = [each for each in self.merged_measures if isinstance(each, Gram)]
        return any(each.axis(self.shared) is not None for each in grams)

    def of(self, model: int) -> Any:
        """The settings of one model, as attributes."""
        return SimpleNamespace(
            **{name: value[model] if isinstance(value, tuple) else value for name, value in self.settings}
        )

    def numbers_of(self, model: int) -> dict[str, float]:
        """The numeric settings of one model, and its weight, by name."""
        own = {name: value[model] if isinstance(value, tuple) else value for name, value in self.settings}
        return {"weight": self.weights[model], **{
            name: float(value) for name, value in own.items() if not isinstance(value, bool | str)
        }}  # fmt: skip

    @property
    def shared(self) -> Any:
        """All settings, and the weights, as attributes."""
        return SimpleNamespace(weights=self.weights, **dict(self.settings))

    def stream(self, model: int) -> int:
        """The stream number that a model's draws depend on."""
        return self.streams[model] if self.streams else model

    @property
    def coefficients(self) -> tuple[float, ...] | None:
        """The models' factors if the result is a weighted sum with constant factors; else None."""
        weighted_sum = total(array("x") * number("weight"))
        measured = bool(self.merged_measures) or self.combination.matrix is not None
        if self.sparsifier is not None or measured or self.chain.combine != weighted_sum:
            return None
        return tuple(weight * self.factor for weight in self.weights)

    def described(self) -> dict[str, object]:
        """Everything that the method depends on, by name, for the report; without the seed, which is the recipe's."""
        weights = {"weights": list(self.weights)} if self.combination.weights != "none" else {}
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in self.settings}
        factor: dict[str, object] = {"lambda": self.factor} if self.factor != 1 else {}
        if self.norm is not None:
            factor = {"lambda": f"norm {self.norm:g}"}
        return {"merge_type": self.merge_type, "sparsify_type": self.sparsify_type, **weights, **own, **factor}

    @property
    def needs_sums(self) -> bool:
        """Whether sums of magnitudes are measured."""
        models = range(len(self.weights))
        return any(
            isinstance(each, OrderStatistics) and any(each.sums(self.of(model)) for model in models)
            for each in self.element_measures
        )

    @property
    def counts_magnitudes(self) -> bool:
        """Whether magnitudes are tallied before tensors are merged."""
        measures = (*self.element_measures, *self.merged_measures)
        return any(isinstance(each, OrderStatistics | Ranks) for each in measures)

    @property
    def reads_twice(self) -> bool:
        """Whether tensors are measured before they are merged."""
        measured = bool(self.element_measures or self.merged_measures)
        return measured or self.combination.matrix is not None
