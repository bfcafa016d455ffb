"""Products and linear systems in a fixed order: the same bits whether compiled or not, and as numpy's nearly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from driving import store
from test_whole_matrix import walk

from modelfuse.dtypes import F64
from modelfuse.kernels import Work, algebra
from modelfuse.kernels.algebra import FIXED_ORDER, LAPACK
from modelfuse.kernels.compiled import ordered_products
from modelfuse.kernels.compiled.ordered_products import DEPTH, ROWS, _add_plainly, _strided, add_product
from modelfuse.kernels.jit.compile import compiling
from modelfuse.kernels.matrices import Matrices
from modelfuse.methods import registry

Array = np.ndarray[Any, Any]
SIZES = [(1, 1, 1), (7, 5, 3), (33, 300, 70), (ROWS + 1, 64, 17), (16, DEPTH + 9, 530)]


def drawn(rows: int, columns: int, how: str) -> Array:
    draw = np.random.default_rng(rows * columns)
    if how == "turned":
        return draw.standard_normal((columns, rows)).T
    return draw.standard_normal((rows, columns + 3))[:, 1 : columns + 1]


@pytest.mark.parametrize("left", ["turned", "cut"])
@pytest.mark.parametrize("right", ["turned", "cut"])
def test_products_have_the_same_bits_compiled_or_not(left: str, right: str) -> None:
    for rows, depth, columns in SIZES:
        one, other = drawn(rows, depth, left), drawn(depth, columns, right)
        compiled, plain = (np.ones((rows, columns + 2)) for _ in range(2))
        with compiling(True):
            add_product(one, other, compiled[:, 1:-1])
        x, y, z = (_strided(each) for each in (one, other, plain[:, 1:-1]))
        _add_plainly(x, y, z, rows, columns, depth)
        assert compiled.tobytes() == plain.tobytes()
        np.testing.assert_allclose(plain[:, 1:-1] - 1, one @ other, atol=1e-12)


def test_sums_are_taken_in_their_order() -> None:
    """One rounding for each operation, as the definition has it."""
    one, other = drawn(9, 300, "cut"), drawn(300, 20, "cut")
    with compiling(True):
        found = np.zeros((9, 20))
        add_product(one, other, found)
    for i, j in ((0, 0), (8, 19), (4, 16)):
        total = 0.0
        for x, y in zip(one[i].tolist(), other[:, j].tolist(), strict=True):
            total += x * y
        assert found[i, j] == total


def test_of_a_matrix_with_itself_half_is_computed() -> None:
    matrix = drawn(70, 300, "cut")
    whole = np.zeros((300, 300))
    add_product(matrix.T.copy(), matrix, whole)
    assert FIXED_ORDER.product(matrix.T, matrix).tobytes() == whole.tobytes()
    assert FIXED_ORDER.product(np.zeros((3, 0)), np.zeros((0, 4))).tolist() == [[0.0] * 4] * 3


@pytest.mark.parametrize("size", [1, 31, 33, 100, 171])
def test_linear_systems_are_as_numpys(size: int) -> None:
    draw = np.random.default_rng(size)
    root = draw.standard_normal((size, size))
    matrix, right = root @ root.T + 0.1 * np.eye(size), draw.standard_normal((size, 5))
    before = matrix.copy()
    np.testing.assert_allclose(FIXED_ORDER.solve(matrix, right), LAPACK.solve(matrix, right), atol=1e-9)
    np.testing.assert_allclose(FIXED_ORDER.inverse(matrix), LAPACK.inverse(matrix), atol=1e-9)
    assert (matrix == before).all()
    with pytest.raises(np.linalg.LinAlgError, match="not positive definite"):
        FIXED_ORDER.inverse(-matrix)


@pytest.mark.parametrize("norm", [None, 0.6])
@pytest.mark.parametrize("cut", [Matrices(1, 70, 40), Matrices(1, 40, 70, False), Matrices(1, 12, 64)])
def test_ridge_has_the_same_bits_compiled_or_not(
    cut: Matrices, norm: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, weights = np.random.default_rng(0), (1.0, 0.5, 2.0)
    stored = [store(draw.standard_normal(cut.unit), F64) for _ in range(4)]
    method = registry.apply(None, registry.COMBINATIONS["ridge"], weights, {}, norm=norm)
    work = Work("w", cut.unit, (F64,) * 4, True, F64, method, (), cut)
    found = []
    for allowed in (True, False):
        if not allowed:
            monkeypatch.setattr(ordered_products, "_add", ordered_products._add_plainly)
        monkeypatch.setattr(algebra, "COMPILED", 0)
        found.append(walk(work, stored)[0].tobytes())
    assert found[0] == found[1]
