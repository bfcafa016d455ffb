"""Symbolic expressions in which methods are declared.

A declaration computes with symbolic elements and numbers and returns an :class:`Expression`, which each backend turns
into compiled loops or operations on arrays. Values have the compute type (float32 or float64) unless said otherwise;
constants are rounded to it once. Operations are never fused, and sums over the models are in order, so that all
backends compute the same bits.

>>> x, low = array("x"), number("low")
>>> print(where(abs(x) >= low, x, 0.0))
where((abs(x) >= low), x, 0.0)
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Literal

from msgspec import Struct

Kind = Literal["real", "single", "truth"]
COMPARISONS = {"<", "<=", ">", ">="}
INFIX = {"+", "-", "*", "/", "&", "|", *COMPARISONS}


class Expression(Struct, frozen=True, dict=True):
    """An operation and its operands.

    Attributes:
        operation: An operator, a function's name, or ``array``, ``number`` or ``constant``.
        operands: The operands.
        value: The name of an array or number, or the value of a constant.
        kind: ``real`` for the compute type, ``single`` for float32, ``truth`` for booleans.
        each: Whether each model has its own value, as that of at least one operand.
    """

    operation: str
    operands: tuple[Expression, ...] = ()
    value: str | float | None = None
    kind: Kind = "real"
    each: bool = False

    @cached_property
    def _hash(self) -> int:
        return hash((self.operation, self.operands, self.value, self.kind, self.each))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[object, ...]:
        # Without the hash: those of strings differ between processes.
        return Expression, (self.operation, self.operands, self.value, self.kind, self.each)

    def __bool__(self) -> bool:
        raise TypeError("Expressions have no truth value; use where(condition, one, other)")

    def __add__(self, other: Operand) -> Expression:
        return _apply("+", self, other)

    def __radd__(self, other: Operand) -> Expression:
        return _apply("+", other, self)

    def __sub__(self, other: Operand) -> Expression:
        return _apply("-", self, other)

    def __rsub__(self, other: Operand) -> Expression:
        return _apply("-", other, self)

    def __mul__(self, other: Operand) -> Expression:
        return _apply("*", self, other)

    def __rmul__(self, other: Operand) -> Expression:
        return _apply("*", other, self)

    def __truediv__(self, other: Operand) -> Expression:
        return _apply("/", self, other)

    def __rtruediv__(self, other: Operand) -> Expression:
        return _apply("/", other, self)

    def __neg__(self) -> Expression:
        return _apply("negative", self)

    def __abs__(self) -> Expression:
        return _apply("abs", self)

    def __lt__(self, other: Operand) -> Expression:
        return _apply("<", self, other)

    def __le__(self, other: Operand) -> Expression:
        return _apply("<=", self, other)

    def __gt__(self, other: Operand) -> Expression:
        return _apply(">", self, other)

    def __ge__(self, other: Operand) -> Expression:
        return _apply(">=", self, other)

    def __and__(self, other: Expression) -> Expression:
        return _apply("&", self, other)

    def __or__(self, other: Expression) -> Expression:
        return _apply("|", self, other)

    def __invert__(self) -> Expression:
        return _apply("not", self)

    def __str__(self) -> str:
        if self.value is not None:
            return str(self.value)
        words = [str(each) for each in self.operands]
        if self.operation in INFIX:
            return f"({words[0]} {self.operation} {words[1]})"
        return f"{self.operation}({', '.join(words)})"


Operand = Expression | float


def array(name: str, *, each: bool = True, kind: Kind = "real") -> Expression:
    """An element of a tensor; with ``each``, of each model's tensor."""
    return Expression("array", value=name, kind=kind, each=each)


def number(name: str, *, each: bool = True) -> Expression:
    """A number that is the same for all elements of a tensor; with ``each``, one per model."""
    return Expression("number", value=name, each=each)


def where(condition: Expression, one: Operand, other: Operand) -> Expression:
    """``one`` where the condition is true, else ``other``."""
    return _apply("where", condition, one, other)


def sign(x: Expression) -> Expression:
    """1, 0 or −1; 0 for NaN."""
    return where(x > 0.0, 1.0, 0.0) - where(x < 0.0, 1.0, 0.0)


def least(x: Operand, y: Operand) -> Expression:
    """The smaller one; ``y`` if either is NaN."""
    x = _expression(x)
    return where(x < y, x, y)


def most(x: Operand, y: Operand) -> Expression:
    """The larger one; ``y`` if either is NaN."""
    x = _expression(x)
    return where(x > y, x, y)


def single(x: Expression) -> Expression:
    """The value rounded to float32, as draws are."""
    return Expression("single", (x,), kind="single", each=x.each)


def root(x: Expression) -> Expression:
    """The square root, correctly rounded."""
    return _apply("root", x)


def total(x: Expression) -> Expression:
    """The sum over the models, in order.

    Raises:
        ValueError: If the expression is the same for all models.
    """
    if not x.each:
        raise ValueError(f"{x} is not a per-model expression")
    return Expression("total", (x,))


def walk(expression: Expression) -> Iterator[Expression]:
    """All distinct subexpressions, operands first."""
    seen: set[Expression] = set()

    def visit(one: Expression) -> Iterator[Expression]:
        if one in seen:
            return
        seen.add(one)
        for operand in one.operands:
            yield from visit(operand)
        yield one

    yield from visit(expression)


def numbers_of(expression: Expression | None, *, each: bool) -> tuple[str, ...]:
    """The names of the numbers in an expression, in the order of :func:`walk`."""
    found = walk(expression) if expression is not None else ()
    return tuple(str(one.value) for one in found if one.operation == "number" and one.each == each)


def uses(expression: Expression | None, name: str) -> bool:
    """Whether an array occurs in an expression."""
    return expression is not None and any(one.operation == "array" and one.value == name for one in walk(expression))


def _expression(value: Operand) -> Expression:
    return value if isinstance(value, Expression) else Expression("constant", value=float(value))


def _apply(operation: str, *operands: Operand) -> Expression:
    made = tuple(map(_expression, operands))
    kinds = {each.kind for each in made[operation == "where" :] if each.operation != "constant"}
    truths = operation in ("&", "|", "not")
    if kinds - {"truth" if truths else "real"} and not (operation in COMPARISONS and kinds == {"single"}):
        raise ValueError(f"{operation} does not take {', '.join(map(str, made))}")
    kind: Kind = "truth" if truths or operation in COMPARISONS else "real"
    return Expression(operation, made, kind=kind, each=any(each.each for each in made))
