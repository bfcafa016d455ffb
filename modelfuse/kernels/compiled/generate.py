"""Generate compiled loops for declared methods: the expressions of a chain become the source of a kernel.

The element step is one loop per model, in place. The combination is split into stages where sums over the models are
needed before it can continue: each stage is one loop over the models, three of them at a time, so that the running sums
stay in registers. Operations appear in the source as declared, each result in a variable of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from modelfuse.kernels.compiled.direct_reads import BLOCK
from modelfuse.kernels.compiled.dot_products import add_products, add_terms, fold_terms
from modelfuse.kernels.compiled.merge_loops import CHUNK, finish, keep_probabilities, load, uniform
from modelfuse.kernels.jit.compile import compile_kernel
from modelfuse.methods.applied import Chain
from modelfuse.methods.expressions import INFIX, Expression, numbers_of, uses, walk

#: Models per iteration of a loop over the models.
TOGETHER = 3
#: Indentation of the generated source.
STEP = "    "
#: The module name of generated kernels in the code cache.
MODULE = "modelfuse.kernels.compiled.generated"

COMBINE = """
def combine(data, first, length, buffers, how, numbers, out_code):
    for start in range(0, length, BLOCK):
        size = min(BLOCK, length - start)
        load(data, start, size, buffers, length)
        for model in range(data.inputs.models):
            apply_element(how, model, first + start, size, buffers)
        combine_block(buffers.x, data.inputs.models, size, numbers.each, numbers.shared, buffers.rows)
        finish(data, buffers, numbers, size, out_code, start)
"""
PRODUCTS = """
def multiply(data, first, length, buffers, how, lanes, sums):
    for chunk in range(0, length, CHUNK):
        lanes[:] = 0.0
        for start in range(chunk, min(chunk + CHUNK, length), BLOCK):
            size = min(BLOCK, length - start)
            load(data, start, size, buffers, length)
            for model in range(data.inputs.models):
                apply_element(how, model, first + start, size, buffers)
            add_products(buffers.x, data.inputs.models, size, lanes, sums, chunk // CHUNK, False)
        add_products(buffers.x, data.inputs.models, 0, lanes, sums, chunk // CHUNK, True)
"""


SUMS = """
def add_up(data, first, length, buffers, how, terms, lanes, sums):
    for chunk in range(0, length, CHUNK):
        lanes[:] = 0.0
        for start in range(chunk, min(chunk + CHUNK, length), BLOCK):
            size = min(BLOCK, length - start)
            load(data, start, size, buffers, length)
            for model in range(data.inputs.models):
                evaluate_terms(how, model, first + start, size, buffers)
                add_terms(buffers.rows, terms, model, size, lanes)
        fold_terms(lanes, sums[chunk // CHUNK])
"""


class ChainKernels(NamedTuple):
    """The kernels of a chain.

    Attributes:
        rows: Rows of ``BlockBuffers.rows`` that they take.
        combine: Merges a slice. Takes Stored, the first element's index, the slice's length, BlockBuffers,
            LaidOutElement, Numbers and the output's storage code.
        multiply: Computes the dot products of all pairs of models. Takes Stored, the first element's index, the
            slice's length, BlockBuffers, LaidOutElement, lanes and sums.
        add_up: Sums the chain's terms. Takes Stored, the first element's index, the slice's length, BlockBuffers,
            LaidOutElement, the number of terms, lanes and sums.
    """

    rows: int
    combine: Callable[..., None]
    multiply: Callable[..., None]
    add_up: Callable[..., None]


class _Writer:
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
        return f"{operands[1]} if {operands[0]} else {operands[2]}"
    words = {"negative": "-{}", "not": "not {}", "abs": "abs({})", "root": "np.sqrt({})", "single": "np.float32({})"}
    return words[operation].format(*operands)


def _constants(*expressions: Expression) -> dict[Expression, str]:
    found = [each for one in expressions for each in walk(one) if each.operation == "constant"]
    return {each: f"c{number}" for number, each in enumerate(dict.fromkeys(found))}


def _constant_lines(constants: Mapping[Expression, str]) -> list[str]:
    return [f"{name} = kind({each.value!r})" for each, name in constants.items()]


def element_source(chain: Chain) -> str:
    """The source of the function that applies the element step to a block of one model, in place."""
    signature = "apply_element(how, model, first, count, buffers)"
    if chain.element is None:
        return f"def {signature}:\n    pass\n"
    return _loop_source(signature, (chain.element,), {"x": "x"})


def terms_source(chain: Chain) -> str:
    """The source of the function that stores the chain's terms of a block of one model in ``buffers.rows``."""
    signature = "evaluate_terms(how, model, first, count, buffers)"
    if not chain.terms:
        return f"def {signature}:\n    pass\n"
    # The first row holds probabilities.
    targets = {f"o{row}": f"rows[{row}]" for row in range(1, 1 + len(chain.terms))}
    return _loop_source(signature, chain.terms, targets)


def _loop_source(signature: str, expressions: Sequence[Expression], targets: Mapping[str, str]) -> str:
    """A function with one loop over a block of one model's elements that stores expressions in named targets."""
    constants = _constants(*expressions)
    columns = {name: f"n{column}" for column, name in enumerate(element_numbers(expressions))}
    arrays = {"x": "x[i]", "draw": "draws[i]", "keep": "keep[i]"}

    def leaf(one: Expression) -> str:
        if one.operation == "constant":
            return constants[one]
        return columns[str(one.value)] if one.operation == "number" else arrays[str(one.value)]

    writer = _Writer(leaf)
    results = [writer.name_of(each) for each in expressions]
    lines = [
        "x, draws, keep, rows = buffers.x[model], buffers.draws, buffers.rows[0], buffers.rows",
        "kind = x.dtype.type",
    ]
    lines += [f"{name} = {target}" for name, target in targets.items() if name != target]
    lines += _constant_lines(constants)
    lines += [f"{name} = how.numbers[model, {column}]" for column, name in enumerate(columns.values())]
    if any(uses(each, "draw") for each in expressions):
        lines.append("uniform(how.keys[model], first, count, buffers.bits, buffers.words, draws)")
    if any(uses(each, "keep") for each in expressions):
        lines.append("keep_probabilities(how, model, first, count, buffers, keep)")
    lines += ["for i in range(count):", *(STEP + line for line in writer.lines)]
    lines += [f"{STEP}{name}[i] = {result}" for name, result in zip(targets, results, strict=True)]
    return _function(signature, lines)


def element_numbers(expressions: Sequence[Expression]) -> tuple[str, ...]:
    """The names of the numbers in expressions of a model's element, in the order of their columns."""
    return tuple(dict.fromkeys(name for each in expressions for name in numbers_of(each, each=True)))


def _level(one: Expression) -> int:
    """The stage of an expression: how deeply sums over the models are nested in it."""
    return max(map(_level, one.operands), default=0) + (one.operation == "total")


class _Combination:
    """Generates the function that combines a block and stores the result in ``rows[0]``."""

    def __init__(self, chain: Chain) -> None:
        self._chain, self._root = chain, chain.combine
        self._constants = _constants(self._root)
        totals = [each for each in walk(self._root) if each.operation == "total"]
        direct = self._root.operation == "total"
        inner = [each for each in totals if each != self._root]
        #: The row of each sum; a result that is a sum itself needs no row of its own.
        self._rows = {each: f"a{number}" for number, each in enumerate(inner, 1)}
        if direct:
            self._rows[self._root] = "a0"
        self._stages: dict[int, list[Expression]] = {}
        for each in totals:
            self._stages.setdefault(_level(each), []).append(each)
        self._direct = direct
        self.rows = 1 + len(inner)

    def source(self) -> str:
        lines = [f"a{row} = rows[{row}]" for row in range(self.rows)]
        lines += ["kind = x.dtype.type", "minus = -kind(0)", *_constant_lines(self._constants)]
        lines += [f"s{column} = shared[{column}]" for column in range(len(self._chain.shared_numbers))]
        if any(one.operation == "array" and one.value == "base" for one in walk(self._root)):
            lines.append("base = x[x.shape[0] - 1]")
        for _, totals in sorted(self._stages.items()):
            lines += self._stage(totals)
        if not self._direct:
            writer = _Writer(lambda one: self._leaf(one, 0))
            result = writer.name_of(self._root)
            lines += ["for i in range(count):", *(STEP + line for line in writer.lines), f"{STEP}a0[i] = {result}"]
        return _function("combine_block(x, models, count, each, shared, rows)", lines)

    def _stage(self, totals: Sequence[Expression]) -> list[str]:
        """The loop of sums that depend on earlier stages only; they start at −0, the identity of addition."""
        lines = ["for i in range(count):", *(f"{STEP}{self._rows[each]}[i] = minus" for each in totals), "model = 0"]
        for together in range(TOGETHER, 0, -1):
            condition = "while models - model >=" if together == TOGETHER else "if models - model =="
            lines += [f"{condition} {together}:", *(STEP + line for line in self._group(totals, together))]
            lines += [f"{STEP}model += {together}"]
        return lines

    def _group(self, totals: Sequence[Expression], together: int) -> list[str]:
        columns = len(self._chain.each_numbers)
        lines = [f"x{offset} = x[model + {offset}]" for offset in range(together)]
        lines += [f"w{offset}_{column} = each[model + {offset}, {column}]"
                  for offset in range(together) for column in range(columns)]  # fmt: skip
        body, sums = list[str](), {each: f"{self._rows[each]}[i]" for each in totals}
        for offset in range(together):
            writer = _Writer(lambda one, offset=offset: self._leaf(one, offset))  # type: ignore[misc]
            for number, each in enumerate(totals):
                term = writer.name_of(each.operands[0])
                name = f"v{number}"
                writer.lines.append(f"{name} = {sums[each]} + {term}")
                sums[each] = name
            body += writer.lines
        body += [f"{self._rows[each]}[i] = {sums[each]}" for each in totals]
        return [*lines, "for i in range(count):", *(STEP + line for line in body)]

    def _leaf(self, one: Expression, offset: int) -> str:
        if one.operation == "constant":
            return self._constants[one]
        if one.operation == "total":
            return f"{self._rows[one]}[i]"
        if one.operation == "array":
            return f"x{offset}[i]" if one.each else f"{one.value}[i]"
        if one.each:
            return f"w{offset}_{self._chain.each_numbers.index(str(one.value))}"
        return f"s{self._chain.shared_numbers.index(str(one.value))}"


def _function(signature: str, lines: Sequence[str]) -> str:
    return "\n".join([f"def {signature}:", *(STEP + line for line in lines), ""])


def combination_source(chain: Chain) -> tuple[str, int]:
    """The source of the function that combines a block, and the number of rows that it needs."""
    made = _Combination(chain)
    return made.source(), made.rows


@lru_cache(maxsize=64)
def kernels_of(chain: Chain) -> ChainKernels:
    """The kernels of a chain; compiled on their first call."""
    element, (combination, rows) = element_source(chain), combination_source(chain)
    terms = terms_source(chain)
    digest = hashlib.blake2b((element + combination).encode(), digest_size=6).hexdigest()
    element_digest = hashlib.blake2b(element.encode(), digest_size=6).hexdigest()
    known: dict[str, Any] = {
        "__name__": MODULE, "np": np, "BLOCK": BLOCK, "CHUNK": CHUNK, "load": load, "uniform": uniform,
        "keep_probabilities": keep_probabilities, "finish": finish, "add_products": add_products,
        "add_terms": add_terms, "fold_terms": fold_terms,
    }  # fmt: skip
    known["apply_element"] = _compile(element, "apply_element", element_digest, known)
    known["combine_block"] = _compile(combination, "combine_block", digest, known)
    combine = _compile(COMBINE, "combine", digest, known)
    multiply = _compile(PRODUCTS, "multiply", element_digest, known)
    terms_digest = hashlib.blake2b(terms.encode(), digest_size=6).hexdigest()
    known["evaluate_terms"] = _compile(terms, "evaluate_terms", terms_digest, known)
    add_up = _compile(SUMS, "add_up", terms_digest, known)
    return ChainKernels(max(rows, 1 + len(chain.terms)), combine, multiply, add_up)


def _compile(source: str, name: str, digest: str, known: Mapping[str, Any]) -> Any:
    namespace = dict(known)
    exec(compile(source, f"<{name} {digest}>", "exec"), namespace)
    function = namespace[name]
    function.__qualname__ = function.__name__ = f"{name}_{digest}"
    return compile_kernel(function)
