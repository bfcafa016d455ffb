"""Merging one tensor: which passes a method takes, and what each one learns. Written once for all backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from modelfuse.kernels import Pass, Procedure, Work
from modelfuse.kernels.measures import Element, Tallies, measure_element
from modelfuse.kernels.whole_matrix import MatrixPass

Array = np.ndarray[Any, Any]


class Coefficients(NamedTuple):
    """The numbers that a combination takes.

    Attributes:
        each: Those that are one a model, by name: one mapping a model.
        shared: Those that are the same for all models, by name.
        factor: What the result is multiplied by before the base is added.
    """

    each: list[dict[str, float]]
    shared: dict[str, float]
    factor: float

    def table(self, names: Sequence[str], compute: str) -> Array:
        """Those of each model, in the order of their names: the compute type, shape (models, names)."""
        rows = [[numbers[name] for name in names] for numbers in self.each]
        return np.array(rows, compute).reshape(len(self.each), len(names))

    def row(self, names: Sequence[str], compute: str) -> Array:
        """Those that are the same for all models, in the order of their names: the compute type, shape (names,)."""
        return np.array([self.shared[name] for name in names], compute)


class Backend(Tallies, Protocol):
    """The passes of one kind of kernels."""

    def products(self, work: Work, element: Element) -> ProductsPass:
        """The pass that measures the dot products of all pairs of models."""

    def combine(self, work: Work, element: Element, numbers: Coefficients) -> Pass:
        """The pass that merges and writes."""


class ProductsPass(Pass, Protocol):
    """A pass that measures dot products."""

    def gram(self, found: list[Any]) -> Array:
        """The Gram matrix, float64, shape (models, models), from what the spans found in their order."""


def merge_procedure(work: Work, backend: Backend) -> Procedure:
    """The passes that merge one tensor."""
    method, combination = work.method, work.method.combination
    if work.matrices is not None:
        yield MatrixPass(work)
        return
    element = yield from measure_element(work, backend)
    each = [method.numbers_of(model) for model in range(work.models)]
    if combination.measure is not None:
        pass_ = backend.products(work, element)
        weights = combination.measure.weights(pass_.gram((yield pass_)), method.shared)
        each = [{**own, "weight": weight} for own, weight in zip(each, weights, strict=True)]
    shared = {**each[0], **combination.numbers(method.shared)}
    yield backend.combine(work, element, Coefficients(each, shared, method.factor))


def run_through(procedure: Procedure, walk: Callable[[Pass], list[Any]]) -> None:
    """Run a procedure to its end in this thread.

    Args:
        procedure: Merges one tensor.
        walk: Walks a pass over the whole tensor; returns what its spans have found, in their order.
    """
    pass_ = next(procedure, None)
    while pass_ is not None:
        try:
            pass_ = procedure.send(walk(pass_))
        except StopIteration:
            return
