"""The procedure that merges one tensor: the passes that a method needs, for all backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
from msgspec import Struct, field

from modelfuse.errors import RecipeError
from modelfuse.kernels import Pass, Procedure, Work
from modelfuse.kernels.divergence import DivergencePasses, measure_divergence
from modelfuse.kernels.element import Element, Merged, table_of
from modelfuse.kernels.gram import pairs_of
from modelfuse.kernels.lines import Lines
from modelfuse.kernels.measures import ElementPasses, Passes, SumsPass, measure_element, measure_magnitudes
from modelfuse.methods.expressions import Expression
from modelfuse.methods.spec import Algebra, Divergence, Gram, OrderStatistics, Sums

Array = np.ndarray[Any, Any]


class Coefficients(Struct, frozen=True):
    """The numbers in a combination's expression.

    Attributes:
        each: Numbers that each model has its own of, by name: one mapping per model.
        shared: Numbers that all models share, by name.
        factor: Multiplies the result before the base is added.
        lined: Numbers that each line has its own of.
    """

    each: list[dict[str, float]]
    shared: dict[str, float]
    factor: float
    lined: dict[str, tuple[Lines, Array]] = field(default_factory=dict)

    def table(self, names: Sequence[str], compute: str) -> Array:
        """The named numbers of each model: compute type, shape (models, names)."""
        return table_of(self.each, names, compute)

    def row(self, names: Sequence[str], compute: str) -> Array:
        """The named numbers that all models share: compute type, shape (names,)."""
        return np.array([self.shared[name] for name in names], compute)


class Backend(ElementPasses, DivergencePasses, Protocol):
    """The passes of one backend."""

    def algebra(self) -> Algebra | None:
        """What computes with whole matrices; None: numpy and compiled loops."""

    def products(self, work: Work, element: Element) -> ProductsPass:
        """The pass that measures the dot products of all pairs of models."""

    def line_products(self, work: Work, element: Element, lines: Lines) -> LinePass:
        """The same along lines; rows in the order of :func:`pairs_of`."""

    def merged_sums(self, work: Work, element: Element, numbers: Coefficients, terms: Sequence[Expression]) -> SumsPass:
        """Sums terms of all models' elements."""

    def combine(self, work: Work, element: Element, numbers: Coefficients) -> Pass:
        """The pass that merges and writes."""


class ProductsPass(Pass, Protocol):
    """A pass that measures dot products."""

    def gram(self, found: list[Any]) -> Array:
        """The Gram matrix, float64, shape (models, models), from the findings of the spans, in order."""


class LinePass(Pass, Protocol):
    """A pass that sums along lines."""

    def sums(self, found: list[Any]) -> Array:
        """The sums, float64, shape (rows, lines), from the findings of the spans, in order."""


def merge_procedure(work: Work, backend: Backend) -> Procedure:
    """The procedure that merges one tensor."""
    method, combination = work.method, work.method.combination
    if work.matrices is not None:
        from modelfuse.kernels.product_pass import ProductPass  # Most merges need none of it.
        from modelfuse.kernels.whole_matrix import MatrixPass

        yield ProductPass(work) if work.matrices.merged is not None else MatrixPass(work, backend.algebra())
        return
    element = yield from measure_element(work, backend)
    each = [method.numbers_of(model) for model in range(work.models)]
    shared = {**each[0], "models": float(work.models), **combination.numbers(method.shared)}
    numbers = Coefficients(each, shared, method.factor)
    for measure in method.merged_measures:
        yield from MEASURES[type(measure)](work, backend, element, numbers, measure)
    yield backend.combine(work, element, numbers)


def _measure_gram(work: Work, backend: Backend, element: Element, numbers: Coefficients, measure: Gram) -> Passes:
    """Weights from dot products: one per model, or one per model and line."""
    settings = work.method.shared
    if (axis := measure.axis(settings)) is None:
        pass_ = backend.products(work, element)
        weights = _weights(work, measure, pass_.gram((yield pass_)))
        for own, weight in zip(numbers.each, weights, strict=True):
            own["weight"] = weight
        return
    lines = Lines.along(work.shape, work.size, axis)
    by_line = backend.line_products(work, element, lines)
    sums = by_line.sums((yield by_line))
    gram = np.empty((lines.number, work.models, work.models))
    for (one, other), row in zip(pairs_of(work.models), sums, strict=True):
        gram[:, one, other] = gram[:, other, one] = row
    numbers.lined["weight"] = lines, np.array([_weights(work, measure, own) for own in gram]).T


def _weights(work: Work, measure: Gram, gram: Array) -> Sequence[float]:
    try:
        return measure.weights(gram, work.method.shared)
    except ValueError as error:
        raise RecipeError(
            f"Tensor {work.name!r}: {error}", "Merge it with another method, or take it from one model."
        ) from error


def _measure_sums(work: Work, backend: Backend, element: Element, numbers: Coefficients, measure: Sums) -> Passes:
    pass_ = backend.merged_sums(work, element, numbers, work.method.traced(measure.terms, merged=True))
    found = measure.numbers(pass_.sums((yield pass_)), work.size, _known(work, numbers))
    for name, values in found.items():
        for own, value in zip(numbers.each, values, strict=True):
            own[name] = value
        numbers.shared[name] = values[0]


def _measure_order(
    work: Work, backend: Backend, element: Element, numbers: Coefficients, measure: OrderStatistics
) -> Passes:
    assert measure.of is not None
    settings = _known(work, numbers)
    sums, of = measure.sums(settings), work.method.traced(measure.of, merged=True)
    every = [settings] * (work.models if of.each else 1)
    found = yield from measure_magnitudes(work, backend, measure, every, sums, Merged(of, element, numbers, sums))
    if not of.each:
        numbers.shared.update(found[0])
        return
    for own, more in zip(numbers.each, found, strict=True):
        own.update(more)


def _measure_divergence(
    work: Work, backend: Backend, element: Element, numbers: Coefficients, measure: Divergence
) -> Passes:
    del element
    lines = Lines.along(work.shape, work.size, -1)
    numbers.lined["divergence"] = lines, (yield from measure_divergence(work, backend, lines, measure.least))[None]


#: For each type of measure, the passes that measure it and add the results to the numbers.
MEASURES: Mapping[type, Callable[..., Passes]] = {
    Gram: _measure_gram,
    Sums: _measure_sums,
    OrderStatistics: _measure_order,
    Divergence: _measure_divergence,
}


def _known(work: Work, numbers: Coefficients) -> Any:
    """All settings, and the numbers that all models share, as attributes."""
    return SimpleNamespace(**{**vars(work.method.shared), **numbers.shared})


def run_through(procedure: Procedure, walk: Callable[[Pass], list[Any]]) -> None:
    """Run a procedure in this thread.

    Args:
        procedure: The procedure.
        walk: Runs a pass over the whole tensor; returns the findings of its spans, in order.
    """
    pass_ = next(procedure, None)
    while pass_ is not None:
        try:
            pass_ = procedure.send(walk(pass_))
        except StopIteration:
            return
