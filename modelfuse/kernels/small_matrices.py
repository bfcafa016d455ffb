"""Whole-matrix methods on small matrices, held in memory in float64."""

from __future__ import annotations

import numpy as np

from modelfuse.errors import ModelfuseError
from modelfuse.kernels.algebra import algebra_of
from modelfuse.kernels.gram_matrices import ratio, square_of_sum, sum_of_squares
from modelfuse.methods.applied import Applied
from modelfuse.methods.spec import Floats


def merge_matrices(name: str, values: Floats, method: Applied, of_columns: bool, inputs: int) -> Floats:
    """Merge one matrix per model, before scaling by the method's factor.

    Args:
        name: The tensor, for errors.
        values: Shape (models, rows, columns); columns are inputs.
        method: The method.
        of_columns: Whether Gram matrices are those of the columns, for methods that use the smaller side.
        inputs: The inputs of the layer, for methods that depend on them.

    Raises:
        ModelfuseError: If a decomposition fails.
    """
    how = method.combination.matrix
    assert how is not None
    if not np.isfinite(values).all():
        return np.full(values.shape[1:], np.nan)
    if how.side != "smaller":
        of_columns = how.side == "inputs"
    turned = values if of_columns else values.transpose(0, 2, 1)
    k = turned.shape[2]
    if how.gram == "sum":
        turned = np.tensordot(np.array(method.weights), turned, 1)[None]
    algebra = algebra_of(how)
    with np.errstate(all="ignore"):
        if how.gram == "pairs":
            grams = np.stack([[algebra.product(one.T, other) for other in turned] for one in turned])
        else:
            grams = np.stack([algebra.product(one.T, one) for one in turned])
            grams = grams[0] if how.gram == "sum" else grams
        # Methods of the smaller side tell which one it is by comparing the inputs with the Gram matrix's size.
        inputs = k if how.side == "smaller" and of_columns else inputs
        try:
            factors, shared = how.factors(grams, method.weights, method.shared, inputs, algebra)
        except np.linalg.LinAlgError as error:
            raise ModelfuseError(
                f"Tensor {name!r}: {method.merge_type} cannot be computed: {error}",
                "Add a rule that merges it with another method.",
            ) from error
        products = (algebra.product(one, factor) for one, factor in zip(turned, factors, strict=True))
        made: Floats = sum(products, np.zeros(turned.shape[1:]))
        made = made if shared is None else algebra.product(made, shared)
        if method.norm is not None:
            made *= method.norm * ratio(square_of_sum([*turned], method.weights, how.gram), sum_of_squares(made))
    return made if of_columns else made.T
