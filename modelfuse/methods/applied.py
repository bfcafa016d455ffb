"""A method with all its settings: what a merge of one tensor needs to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any

from modelfuse.methods.expressions import Expression, array, number, numbers_of, total, uses
from modelfuse.methods.spec import Combination, OrderStatistics, Sparsifier, Value


@dataclass(frozen=True, eq=False)
class Chain:
    """The expressions of a sparsifier and a combination, for certain switches and choices.

    Attributes:
        element: What becomes of a model's element before; None: nothing.
        combine: What becomes of all.
    """

    element: Expression | None
    combine: Expression

    @cached_property
    def element_numbers(self) -> tuple[str, ...]:
        """The numbers of the element step, one of each a model."""
        return numbers_of(self.element, each=True)

    @cached_property
    def each_numbers(self) -> tuple[str, ...]:
        """The numbers of the combination that are one a model; ``weight`` among them."""
        return numbers_of(self.combine, each=True)

    @cached_property
    def shared_numbers(self) -> tuple[str, ...]:
        """The numbers of the combination that are the same for all models."""
        return numbers_of(self.combine, each=False)

    @cached_property
    def draws(self) -> bool:
        """Whether the element step takes draws."""
        return uses(self.element, "draw")

    @cached_property
    def keeps(self) -> bool:
        """Whether it takes a probability that depends on the rank."""
        return uses(self.element, "keep")

    @cached_property
    def text(self) -> str:
        """What tells it from others."""
        return f"{self.element} -> {self.combine}"


class _Names(SimpleNamespace):
    """Elements and numbers by name, for a declaration to compute with."""

    def __init__(self, each: bool, known: Mapping[str, object]) -> None:
        super().__init__(**known)
        self._each = each

    def __getattr__(self, name: str) -> Expression:
        if name.startswith("_"):
            raise AttributeError(name)
        return number(name, each=self._each)


@lru_cache(maxsize=256)
def _trace(sparsifier: Sparsifier | None, combination: Combination, static: tuple[tuple[str, Value], ...]) -> Chain:
    known = dict(static)
    element = None
    if sparsifier is not None:
        arrays = {"x": array("x"), "draw": array("draw", kind="single"), "keep": array("keep")}
        element = sparsifier.element(_Names(True, {**known, **arrays}))
    merged = {"x": array("x"), "base": array("base", each=False), "weight": number("weight")}
    return Chain(element, combination.combine(_Names(False, {**known, **merged})))


@dataclass(frozen=True)
class Applied:
    """A method with all its settings: what a merge of one tensor needs to know.

    Attributes:
        combination: Makes one tensor of all.
        sparsifier: Acts on each model before, if there is one.
        weights: One weight a model.
        settings: The settings of both, by name; those that differ by model as a tuple of one a model.
        seed: The seed of all random draws.
        streams: Each model's number in the recipe, which its draws depend on; empty: 0, 1, 2, …
        factor: What the merged difference (without a base: the merged tensor) is multiplied by: λ.
        norm: Of a method of whole matrices: what is made of each matrix is multiplied so that its norm is this share of
            that of the sum of the differences, weights having a mean of 1. None: it stays as it is.
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
            parameters = (*self.combination.parameters, *(self.sparsifier.parameters if self.sparsifier else ()))
            static = {each.name for each in parameters if each.is_static}
            known = tuple((name, value) for name, value in self.settings if name in static)
            self._cache["chain"] = _trace(self.sparsifier, self.combination, known)
        chain: Chain = self._cache["chain"]
        return chain

    def of(self, model: int) -> Any:
        """The settings of one model, as attributes."""
        return SimpleNamespace(
            **{name: value[model] if isinstance(value, tuple) else value for name, value in self.settings}
        )

    def numbers_of(self, model: int) -> dict[str, float]:
        """The settings of one model that are numbers, and its weight, by name."""
        own = {name: value[model] if isinstance(value, tuple) else value for name, value in self.settings}
        return {"weight": self.weights[model], **{
            name: float(value) for name, value in own.items() if not isinstance(value, bool | str)
        }}  # fmt: skip

    @property
    def shared(self) -> Any:
        """All settings, as attributes."""
        return SimpleNamespace(**dict(self.settings))

    def stream(self, model: int) -> int:
        """The number that a model's draws depend on."""
        return self.streams[model] if self.streams else model

    @property
    def coefficients(self) -> tuple[float, ...] | None:
        """The models' factors where the result is a weighted sum of them, whatever they hold; None if it is not."""
        weighted_sum = total(array("x") * number("weight"))
        measured = self.combination.measure is not None or self.combination.matrix is not None
        if self.sparsifier is not None or measured or self.chain.combine != weighted_sum:
            return None
        return tuple(weight * self.factor for weight in self.weights)

    def described(self) -> dict[str, object]:
        """All that it depends on by name, for a report; the seed, which is the recipe's, apart."""
        weights = {"weights": list(self.weights)} if self.combination.weights != "none" else {}
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in self.settings}
        factor: dict[str, object] = {"lambda": self.factor} if self.factor != 1 else {}
        if self.norm is not None:
            factor = {"lambda": f"norm {self.norm:g}"}
        return {"merge_type": self.merge_type, "sparsify_type": self.sparsify_type, **weights, **own, **factor}

    @property
    def needs_sums(self) -> bool:
        """Whether sums of magnitudes are measured."""
        measure = self.sparsifier.measure if self.sparsifier else None
        return isinstance(measure, OrderStatistics) and any(
            measure.sums(self.of(model)) for model in range(len(self.weights))
        )

    @property
    def counts_magnitudes(self) -> bool:
        """Whether magnitudes are counted before tensors are merged."""
        return self.sparsifier is not None and self.sparsifier.measure is not None

    @property
    def reads_twice(self) -> bool:
        """Whether tensors are measured before they are merged."""
        return self.counts_magnitudes or self.combination.measure is not None or self.combination.matrix is not None
