"""Source of the loops for expressions of all models' elements: combinations, and what is measured of merged elements.

Expressions are evaluated in stages where sums over the models are needed before they can continue: each stage is one
loop over the models, three of them at a time, so that the running sums stay in registers. Operations appear in the
source as declared, each result in a variable of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from modelfuse.kernels.compiled.source import (
    STEP,
    Writer,
    constant_lines,
    constants_of,
    function_source,
    loop_lines,
    names_of,
)
from modelfuse.methods.expressions import Expression, walk

#: Models per iteration of a loop over the models.
TOGETHER = 3
PARAMETERS = "count, each, shared, rows"


def lined_names(expressions: Sequence[Expression]) -> tuple[str, ...]:
    """The names of the numbers that each line of the tensor has its own of."""
    arrays = [str(one.value) for each in expressions for one in walk(each) if one.operation == "array"]
    return tuple(dict.fromkeys(name for name in arrays if name not in ("x", "base")))


class Combination:
    """The source of the functions that evaluate expressions of all models' elements for a block.

    ``sum_models`` sums over the models; then ``evaluate_model`` stores the expressions' values for one model in the
    first rows of ``rows``: one row per expression, in order.

    Args:
        roots: The expressions.

    Attributes:
        rows: The number of rows that are needed for results and sums.
        lined: The names of the numbers that each line has its own of; their values follow in further rows, a row for
            each model.
        each: The names of the numbers that each model has its own of, in the order of their columns.
        shared: The names of the numbers that all models share, in the order of their columns.
    """

    def __init__(self, roots: Sequence[Expression]) -> None:
        self._roots, self._constants = roots, constants_of(*roots)
        self.lined = lined_names(roots)
        self.each, self.shared = names_of(roots, each=True), names_of(roots, each=False)
        totals = dict.fromkeys(each for root in roots for each in walk(root) if each.operation == "total")
        #: The row of each sum; a result that is a sum itself needs no row of its own.
        direct = {root: row for row, root in enumerate(roots) if root.operation == "total"}
        inner = [each for each in totals if each not in direct]
        self._rows = direct | {each: row for row, each in enumerate(inner, len(roots))}
        self.rows = len(roots) + len(inner)
        self._stages: dict[int, list[Expression]] = {}
        for each in totals:
            self._stages.setdefault(_level(each), []).append(each)

    def rows_for(self, models: int) -> int:
        """All rows that are needed for so many models."""
        return self.rows + len(self.lined) * models

    def sums_source(self) -> str:
        """The source of ``sum_models``."""
        lines = self._begin() if self._stages else []
        for _, totals in sorted(self._stages.items()):
            lines += self._stage(totals)
        return function_source(f"sum_models(x, models, {PARAMETERS})", lines)

    def values_source(self) -> str:
        """The source of ``evaluate_model``."""
        writer, stores = Writer(lambda one: self._leaf(one, 0)), []
        for row, root in enumerate(self._roots):
            if self._rows.get(root) != row:
                stores.append(f"a{row}[i] = {writer.name_of(root)}")
        lines = [*self._begin(), *self._model("model", 0), *loop_lines(writer, stores)] if stores else []
        return function_source(f"evaluate_model(x, models, model, {PARAMETERS})", lines)

    def _begin(self) -> list[str]:
        lines = [f"a{row} = rows[{row}]" for row in range(self.rows)]
        lines += ["kind = x.dtype.type", "minus = -kind(0)", *constant_lines(self._constants)]
        lines += [f"s{column} = shared[{column}]" for column in range(len(self.shared))]
        return [*lines, "base = x[x.shape[0] - 1]"]

    def _model(self, model: str, offset: int) -> list[str]:
        """The variables of a model's elements and numbers."""
        lines = [f"x{offset} = x[{model}]"]
        lines += [f"w{offset}_{column} = each[{model}, {column}]" for column in range(len(self.each))]
        return lines + [f"l{offset}_{number} = rows[{self.rows} + {number} * models + {model}]"
                        for number in range(len(self.lined))]  # fmt: skip

    def _stage(self, totals: Sequence[Expression]) -> list[str]:
        """The loop of sums that depend on earlier stages only; they start at −0, the identity of addition."""
        zeros = [f"{STEP}a{self._rows[each]}[i] = minus" for each in totals]
        lines = ["for i in range(count):", *zeros, "model = 0"]
        for together in range(TOGETHER, 0, -1):
            condition = "while models - model >=" if together == TOGETHER else "if models - model =="
            lines += [f"{condition} {together}:", *(STEP + line for line in self._group(totals, together))]
            lines += [f"{STEP}model += {together}"]
        return lines

    def _group(self, totals: Sequence[Expression], together: int) -> list[str]:
        lines = [line for offset in range(together) for line in self._model(f"model + {offset}", offset)]
        body, sums = list[str](), {each: f"a{self._rows[each]}[i]" for each in totals}
        for offset in range(together):
            writer = Writer(lambda one, offset=offset: self._leaf(one, offset))  # type: ignore[misc]
            for number, each in enumerate(totals):
                term = writer.name_of(each.operands[0])
                name = f"v{number}"
                writer.lines.append(f"{name} = {sums[each]} + {term}")
                sums[each] = name
            body += writer.lines
        body += [f"a{self._rows[each]}[i] = {sums[each]}" for each in totals]
        return [*lines, "for i in range(count):", *(STEP + line for line in body)]

    def _leaf(self, one: Expression, offset: int) -> str:
        if one.operation == "constant":
            return self._constants[one]
        if one.operation == "total":
            return f"a{self._rows[one]}[i]"
        name = str(one.value)
        if one.operation == "array":
            if name in self.lined:
                return f"l{offset}_{self.lined.index(name)}[i]"
            return f"x{offset}[i]" if one.each else "base[i]"
        return f"w{offset}_{self.each.index(name)}" if one.each else f"s{self.shared.index(name)}"


def _level(one: Expression) -> int:
    """The stage of an expression: how deeply sums over the models are nested in it."""
    return max(map(_level, one.operands), default=0) + (one.operation == "total")
