"""Generate compiled loops for declared methods: the expressions of a chain become the source of a kernel.

The element step is one loop per model, in place. Loops over all models' elements are written by
:class:`modelfuse.kernels.compiled.combination.Combination`: those of the result, and those of what is measured first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from modelfuse.kernels.compiled.combination import Combination
from modelfuse.kernels.compiled.direct_reads import BLOCK
from modelfuse.kernels.compiled.dot_products import add_products, add_terms, fold_terms
from modelfuse.kernels.compiled.histograms import count_only, tally_block
from modelfuse.kernels.compiled.merge_loops import (
    CHUNK,
    choose,
    expand,
    finish,
    keep_marked,
    keep_probabilities,
    load,
    uniform,
)
from modelfuse.kernels.compiled.source import (
    Writer,
    constant_lines,
    constants_of,
    function_source,
    loop_lines,
    names_of,
)
from modelfuse.kernels.jit.compile import compile_kernel
from modelfuse.methods.applied import Chain
from modelfuse.methods.expressions import Expression, uses

#: The module name of generated kernels in the code cache.
MODULE = "modelfuse.kernels.compiled.generated"
#: What generated functions call.
KNOWN: Mapping[str, Any] = {
    "__name__": MODULE, "np": np, "BLOCK": BLOCK, "CHUNK": CHUNK, "load": load, "uniform": uniform, "expand": expand,
    "choose": choose, "keep_marked": keep_marked, "keep_probabilities": keep_probabilities, "finish": finish,
    "add_products": add_products, "add_terms": add_terms, "fold_terms": fold_terms, "count_only": count_only,
    "tally_block": tally_block,
}  # fmt: skip

ELEMENTS = """
def load_elements(data, first, start, size, length, buffers, how):
    load(data, start, size, buffers, length)
    for model in range(data.inputs.models):
        apply_element(how, model, first + start, size, buffers)
"""
#: Before and after :data:`EXPAND`, which is there if lines have numbers of their own.
SUMS_OF_MODELS = (
    """
def load_sums(data, first, start, size, length, buffers, how, numbers):
    load_elements(data, first, start, size, length, buffers, how)
""",
    """
    sum_models(buffers.x, data.inputs.models, size, numbers.each, numbers.shared, buffers.rows)
""",
)
EXPAND = "    expand(numbers.lined, first + start, size, buffers.rows[{}:])"
COMBINE = """
def combine(data, first, length, buffers, how, numbers, out_code):
    for start in range(0, length, BLOCK):
        size = min(BLOCK, length - start)
        load_sums(data, first, start, size, length, buffers, how, numbers)
        evaluate_model(buffers.x, data.inputs.models, 0, size, numbers.each, numbers.shared, buffers.rows)
        finish(data, buffers, numbers, size, out_code, start)
"""
PRODUCTS = """
def multiply(data, first, length, buffers, how, lanes, sums):
    for chunk in range(0, length, CHUNK):
        lanes[:] = 0.0
        for start in range(chunk, min(chunk + CHUNK, length), BLOCK):
            size = min(BLOCK, length - start)
            load_elements(data, first, start, size, length, buffers, how)
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
                add_terms(buffers.rows[1:], terms, model, size, lanes)
        fold_terms(lanes, sums[chunk // CHUNK])
"""
MERGED_SUMS = """
def add_merged(data, first, length, buffers, how, numbers, made, terms, lanes, sums):
    models = data.inputs.models
    for chunk in range(0, length, CHUNK):
        lanes[:] = 0.0
        for start in range(chunk, min(chunk + CHUNK, length), BLOCK):
            size = min(BLOCK, length - start)
            load_sums(data, first, start, size, length, buffers, how, numbers)
            for model in range(made):
                evaluate_model(buffers.x, models, model, size, numbers.each, numbers.shared, buffers.rows)
                add_terms(buffers.rows, terms, model, size, lanes)
        fold_terms(lanes, sums[chunk // CHUNK])
"""
MERGED_TALLY = """
def tally_merged(data, first, length, buffers, how, numbers, made, bins, tables):
    models = data.inputs.models
    count_only(buffers)
    for start in range(0, length, BLOCK):
        size = min(BLOCK, length - start)
        load_sums(data, first, start, size, length, buffers, how, numbers)
        for model in range(made):
            evaluate_model(buffers.x, models, model, size, numbers.each, numbers.shared, buffers.rows)
            x, result = buffers.x[model], buffers.rows[0]
            for i in range(size):
                x[i] = result[i]
        tally_block(buffers, made, size, bins, tables)
"""


class ChainKernels(NamedTuple):
    """The kernels of a chain.

    Attributes:
        combination: The loops of its combination.
        terms: The number of its terms.
        combine: Merges a slice. Takes Stored, the first element's index, the slice's length, BlockBuffers,
            LaidOutElement, Numbers and the output's storage code.
        multiply: Computes the dot products of all pairs of models. Takes Stored, the first element's index, the
            slice's length, BlockBuffers, LaidOutElement, lanes and sums.
        add_up: Sums the chain's terms. Takes Stored, the first element's index, the slice's length, BlockBuffers,
            LaidOutElement, the number of terms, lanes and sums.
    """

    combination: Combination
    terms: int
    combine: Callable[..., None]
    multiply: Callable[..., None]
    add_up: Callable[..., None]

    def rows_for(self, models: int) -> int:
        """Rows of ``BlockBuffers.rows`` that they take for so many models."""
        return max(self.combination.rows_for(models), 1 + self.terms)


class MergedKernels(NamedTuple):
    """The kernels that measure expressions of all models' elements, after a chain's element step.

    Attributes:
        combination: The loops of the expressions.
        add_up: Sums them. Takes Stored, the first element's index, the slice's length, BlockBuffers, LaidOutElement,
            Numbers, how many models have values of their own (1: all share them), the number of expressions, lanes
            and sums.
        tally: Tallies the magnitudes of a single expression. Takes Stored, the first element's index, the slice's
            length, BlockBuffers, LaidOutElement, Numbers, how many models have values of their own, Bins and tables.
    """

    combination: Combination
    add_up: Callable[..., None]
    tally: Callable[..., None]


def element_source(chain: Chain) -> str:
    """The source of the function that applies the element step to a block of one model, in place."""
    signature = "apply_element(how, model, first, count, buffers)"
    if chain.element is None:
        return function_source(signature, [])
    return _loop_source(signature, (chain.element,), {"x": "x"}, chain.lined)


def terms_source(chain: Chain) -> str:
    """The source of the function that stores the chain's terms of a block of one model in ``buffers.rows``."""
    signature = "evaluate_terms(how, model, first, count, buffers)"
    if not chain.terms:
        return function_source(signature, [])
    # The first row holds probabilities.
    targets = {f"o{row}": f"rows[{row}]" for row in range(1, 1 + len(chain.terms))}
    return _loop_source(signature, chain.terms, targets, chain.lined)


def _loop_source(signature: str, expressions: Sequence[Expression], targets: Mapping[str, str], lined: bool) -> str:
    """A function with one loop over a block of one model's elements that stores expressions in named targets."""
    constants = constants_of(*expressions)
    columns = {name: f"n{column}" for column, name in enumerate(names_of(expressions, each=True))}
    arrays = {"x": "x[i]", "draw": "draws[i]", "keep": "keep[i]"}

    def leaf(one: Expression) -> str:
        if one.operation == "constant":
            return constants[one]
        return columns[str(one.value)] if one.operation == "number" else arrays[str(one.value)]

    writer = Writer(leaf)
    results = [writer.name_of(each) for each in expressions]
    lines = [
        "x, draws, keep, rows = buffers.x[model], buffers.draws, buffers.rows[0], buffers.rows",
        "kind = x.dtype.type",
    ]
    lines += [f"{name} = {target}" for name, target in targets.items() if name != target]
    lines += constant_lines(constants)
    lines += [f"{name} = how.numbers[model, {column}]" for column, name in enumerate(columns.values())]
    if lined:  # What is kept was marked with other draws; these are those of any block.
        lines.append("keep_marked(model, first, count, buffers, keep)")
    elif any(uses(each, "draw") for each in expressions):
        lines.append("uniform(how.keys[model], first, count, buffers.bits, buffers.words, draws)")
    if not lined and any(uses(each, "keep") for each in expressions):
        lines.append("keep_probabilities(how, model, first, count, buffers, keep)")
    lines += loop_lines(writer, [f"{name}[i] = {result}" for name, result in zip(targets, results, strict=True)])
    return function_source(signature, lines)


class Part(NamedTuple):
    """A function to generate: its name, its source, and the generated functions that it calls."""

    name: str
    source: str
    calls: tuple[Part, ...] = ()


@lru_cache(maxsize=64)
def kernels_of(chain: Chain) -> ChainKernels:
    """The kernels of a chain; compiled on their first call."""
    combination, elements = Combination((chain.combine,)), _load_elements(chain)
    return ChainKernels(
        combination,
        len(chain.terms),
        compiled(Part("combine", COMBINE, _over_models(elements, combination))),
        compiled(Part("multiply", PRODUCTS, (elements,))),
        compiled(Part("add_up", SUMS, (Part("evaluate_terms", terms_source(chain)),))),
    )


@lru_cache(maxsize=64)
def merged_kernels(chain: Chain, expressions: tuple[Expression, ...]) -> MergedKernels:
    """The kernels that measure expressions of all models' elements; compiled on their first call."""
    combination = Combination(expressions)
    parts = _over_models(_load_elements(chain), combination)
    add_up, tally = Part("add_merged", MERGED_SUMS, parts), Part("tally_merged", MERGED_TALLY, parts)
    return MergedKernels(combination, compiled(add_up), compiled(tally))


def _load_elements(chain: Chain) -> Part:
    return Part("load_elements", ELEMENTS, (Part("apply_element", element_source(chain)),))


def _over_models(elements: Part, combination: Combination) -> tuple[Part, ...]:
    lines = EXPAND.format(combination.rows) if combination.lined else ""
    sums = Part("sum_models", combination.sums_source())
    values = Part("evaluate_model", combination.values_source())
    return Part("load_sums", lines.join(SUMS_OF_MODELS), (elements, sums)), values


@lru_cache(maxsize=512)
def compiled(part: Part) -> Any:
    """The compiled function; all chains that need it share it."""
    namespace = {**KNOWN, **{each.name: compiled(each) for each in part.calls}}
    digest = hashlib.blake2b(repr(part).encode(), digest_size=6).hexdigest()
    exec(compile(part.source, f"<{part.name} {digest}>", "exec"), namespace)
    function = namespace[part.name]
    function.__qualname__ = function.__name__ = f"{part.name}_{digest}"
    return compile_kernel(function)
