"""Source text of generated loops: expressions become assignments, each distinct operation once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from modelfuse.methods.expressions import INFIX, Expression, numbers_of, walk

#: Indentation of the generated source.
STEP = "    "
WORDS = {"negative": "-{}", "not": "not {}", "abs": "abs({})", "root": "np.sqrt({})", "single": "np.float32({})"}


class Writer:
    """Writes the body of one loop: each distinct operation is assigned to a variable once.

    Args:
        leaf: Returns the source of an array element, a number or a sum over the models.
    """

    def __init__(self, leaf: Callable[[Expression], str]) -> None:
        self._leaf = leaf
        self._names: dict[Expression, str] = {}
        self.lines: list[str] = []

    def name_of(self, expression: Expression) -> str:
        """The variable of an expression's value; writes the lines that compute it if needed."""
        if expression not in self._names:
            self._names[expression] = self._write(expression)
        return self._names[expression]

    def _write(self, one: Expression) -> str:
        if one.operation in ("array", "number", "total", "constant"):
            return self._leaf(one)
        operands = [self.name_of(each) for each in one.operands]
        name = f"t{len(self._names)}"
        self.lines.append(f"{name} = {_operation(one.operation, operands)}")
        return name


def _operation(operation: str, operands: Sequence[str]) -> str:
    if operation in INFIX:
        return f" {operation} ".join(operands)
    if operation == "where":
        return f"choose({', '.join(operands)})"
    return WORDS[operation].format(*operands)


def constants_of(*expressions: Expression) -> dict[Expression, str]:
    """The variables of the constants in expressions."""
    found = [each for one in expressions for each in walk(one) if each.operation == "constant"]
    return {each: f"c{number}" for number, each in enumerate(dict.fromkeys(found))}


def constant_lines(constants: Mapping[Expression, str]) -> list[str]:
    """The assignments of these variables; ``kind`` is the compute type."""
    return [f"{name} = kind({each.value!r})" for each, name in constants.items()]


def names_of(expressions: Sequence[Expression], *, each: bool) -> tuple[str, ...]:
    """The names of the numbers in expressions, in the order of their columns."""
    return tuple(dict.fromkeys(name for one in expressions for name in numbers_of(one, each=each)))


def function_source(signature: str, lines: Sequence[str]) -> str:
    """The source of a function."""
    return "\n".join([f"def {signature}:", *(STEP + line for line in lines or ["pass"]), ""])


def loop_lines(writer: Writer, stores: Sequence[str]) -> list[str]:
    """A loop over the elements of a block: what was written, then what is stored."""
    return ["for i in range(count):", *(STEP + line for line in (*writer.lines, *stores))]
