"""Evaluate expressions over blocks with a tensor library, operation by operation as declared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from modelfuse.kernels.arrays.arithmetic import Arithmetic
from modelfuse.kernels.arrays.library import Library, Tensor
from modelfuse.methods.expressions import Expression

OPERATIONS: Mapping[str, Callable[..., Tensor]] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x / y,
    "<": lambda x, y: x < y,
    "<=": lambda x, y: x <= y,
    ">": lambda x, y: x > y,
    ">=": lambda x, y: x >= y,
    "&": lambda x, y: x & y,
    "|": lambda x, y: x | y,
    "not": lambda x: ~x,
    "negative": lambda x: -x,
    "abs": abs,
}
ZERO = Expression("constant", value=0.0)
ONE = Expression("constant", value=1.0)


class Evaluator:
    """Evaluates expressions for one block.

    Args:
        library: The tensor library.
        arithmetic: Its arithmetic in the compute type.
        arrays: Elements by name; a list for those that each model has its own of.
        each: Numbers that each model has its own of, by name: one mapping per model.
        shared: Numbers that all models share, by name.
    """

    def __init__(
        self,
        library: Library,
        arithmetic: Arithmetic,
        arrays: Mapping[str, Tensor | Sequence[Tensor]],
        each: Sequence[Mapping[str, float]],
        shared: Mapping[str, float],
    ) -> None:
        self._library, self._arithmetic = library, arithmetic
        self._arrays, self._each, self._shared = arrays, each, shared
        self._models = len(each)
        #: Cached values: those shared by all models, and those of the current model.
        self._known: dict[Expression, Tensor] = {}
        self._own: dict[Expression, Tensor] = {}

    def value(self, one: Expression, model: int = 0) -> Tensor:
        """The value of an expression; for a per-model one, that of ``model``."""
        if one.operation in ("array", "number", "constant"):
            return self._leaf(one, model)
        known = self._own if one.each else self._known
        if one not in known:
            known[one] = self._total(one.operands[0]) if one.operation == "total" else self._apply(one, model)
        return known[one]

    def of_model(self, one: Expression, model: int) -> Tensor:
        """The same, and drop the model's cached values."""
        value = self.value(one, model)
        self.forget()
        return value

    def forget(self) -> None:
        """Drop the current model's cached values, before another model is evaluated."""
        self._own.clear()

    def _leaf(self, one: Expression, model: int) -> Tensor:
        if one.operation == "constant":
            assert isinstance(one.value, float)
            return self._arithmetic.number(one.value)
        name = str(one.value)
        if one.operation == "array":
            found = self._arrays[name]
            return found[model] if one.each else found
        return self._arithmetic.number(self._each[model][name] if one.each else self._shared[name])

    def _total(self, term: Expression) -> Tensor:
        result = self.of_model(term, 0)
        for model in range(1, self._models):
            result = result + self.of_model(term, model)
        return result

    def _apply(self, one: Expression, model: int) -> Tensor:
        if one.operation == "where":
            return self._where(one, model)
        values = [self.value(each, model) for each in one.operands]
        if one.operation == "root":
            return self._library.root(values[0])
        if one.operation == "single":
            return self._library.cast(values[0], "float32")
        return OPERATIONS[one.operation](*values)

    def _where(self, one: Expression, model: int) -> Tensor:
        """``where``; if one side is zero, by masking the other's bits, which is faster."""
        condition, chosen, other = one.operands
        mask = self.value(condition, model)
        if other == ZERO and chosen.operation in ("number", "constant"):
            return self._arithmetic.chosen(mask, self.value(chosen, model))
        if other == ZERO:
            return self._arithmetic.kept(self.value(chosen, model), mask)
        return self._library.where(mask, self.value(chosen, model), self.value(other, model))
