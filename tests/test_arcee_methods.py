"""The methods of arcee's configurations: what is declared is what is defined, to the same bits on every backend."""

from __future__ import annotations

import math
import pickle
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import arcee_definitions
import numpy as np
import pytest
from driving import FLOATS, drive, load, store
from test_array import same_values

from modelfuse.dtypes import BF16, F32, DType
from modelfuse.kernels import Procedure, Work
from modelfuse.kernels.arrays.arithmetic import CHUNK
from modelfuse.kernels.arrays.numpy import NumpyLibrary
from modelfuse.kernels.backends import Device, choose
from modelfuse.kernels.kernel import ArrayKernel, CompiledKernel, Kernel
from modelfuse.methods import arcee
from modelfuse.methods.registry import every_chain

Array = np.ndarray[Any, Any]
SHAPES = ((7,), (5, 6), (3, 4, 5), (37, 400), (7, 5, 101))


class Case(NamedTuple):
    """A method with parameters: one mapping for each model, or a few that are taken in turn; and those of the merge."""

    method: str
    each: Sequence[Mapping[str, Any]] = ({},)
    whole: Mapping[str, Any] = {}
    models: int = 3
    base: bool = True

    @property
    def parameters(self) -> list[Mapping[str, Any]]:
        return [self.each[model % len(self.each)] for model in range(self.models)]


W = ({"weight": 0.5}, {"weight": 0.3}, {"weight": 0.4})
DENSE = ({"weight": 0.5, "density": 0.4}, {"weight": -0.3, "density": 0.75}, {"weight": 0.4})
RANKED = ({"weight": 0.5, "density": 0.5, "epsilon": 0.3}, {"weight": 0.3, "density": 0.7}, {"weight": 0.4})
CASES = [
    Case("linear", W, base=False),
    Case("linear", W, {"normalize": False}, base=False),
    Case("slerp", whole={"t": 0.3}, models=2, base=False),
    Case("slerp", whole={"t": 1.2}, models=2, base=False),
    *[Case("nuslerp", W, {"nuslerp_flatten": flat, "nuslerp_row_wise": row}, 2, base)
      for flat, row in ((True, False), (False, False), (False, True)) for base in (False, True)],
    *[Case("multislerp", W, whole, base=base) for base in (False, True)
      for whole in ({}, {"normalize_weights": False, "eps": 0.25})],
    Case("multislerp", W, models=1),
    *[Case("karcher", whole=whole, base=False) for whole in ({}, {"max_iter": 1}, {"tol": 0.5})],
    Case("task_arithmetic", W),
    Case("task_arithmetic", W, {"normalize": True, "lambda": 0.7}),
    *[Case(name, DENSE, whole) for name in ("ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties")
      for whole in ({}, {"rescale": True, "normalize": True, "lambda": 1.5}, {"rescale": False, "normalize": False})],
    Case("breadcrumbs", ({"weight": 1.0, "density": 0.5, "gamma": 0.2},)),
    *[Case(name, RANKED, whole) for name in ("della", "della_linear")
      for whole in ({}, {"rescale": False, "normalize": True})],
    Case("ties", ({"weight": 1.0, "density": 0.0},)),
    Case("dare_ties", ({"weight": 1.0, "density": 0.0}, {"weight": 1.0, "density": 1.5})),
    Case("model_stock"),
    Case("model_stock", whole={"filter_wise": True}),
    Case("nearswap", whole={"t": 0.4}, models=1),
    Case("arcee_fusion", models=1),
    Case("sce"), Case("sce", whole={"select_topk": 0.3}), Case("sce", whole={"select_topk": 0.0}),
    Case("ram", whole={"epsilon": 0.5}), Case("ram"),
    Case("ramplus_tl", whole={"epsilon": 0.9, "r": 0.5, "alpha": 0.6}), Case("ramplus_tl"),
    Case("passthrough", models=1, base=False), Case("passthrough", ({"scale": -0.5},), models=1, base=False),
]  # fmt: skip


def name_of(case: Case) -> str:
    words = [f"{key}={value}" for key, value in case.whole.items()]
    return " ".join([case.method, *words, "base" if case.base else "", str(case.models)])


def values_of(shape: tuple[int, ...], case: Case, seed: int, scale: float = 1.0) -> list[Array]:
    """Models that have something in common, and a base; some elements are the base's own."""
    random = np.random.default_rng(seed)
    base = random.normal(size=shape)
    common = random.normal(size=shape)
    models = [base + scale * (common + random.normal(size=shape)) for _ in range(case.models)]
    for model in models:
        np.copyto(model, base, where=random.random(shape) < 0.2)
    return [*models, base] if case.base else models


def work_of(case: Case, stored: Sequence[Array], shape: tuple[int, ...], kind: DType, seed: int = 0) -> Work:
    method = arcee.applied(case.method, case.parameters, case.whole, seed=seed)
    return Work("w", stored[0].size, (kind,) * len(stored), case.base, kind, method, shape=shape)


def numpy_kernel(worker_bytes: int = 32_000_000, most: int = 4 * CHUNK) -> ArrayKernel:
    return ArrayKernel(NumpyLibrary(worker_bytes, most))


def merged(kernel: Kernel, work: Work, stored: Sequence[Array], spans: Sequence[int] = (), step: int = CHUNK) -> Array:
    with kernel.running(), np.errstate(all="ignore"):
        return drive(work, stored, spans, step, procedure=kernel.merge(work))[0]


# What is computed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_what_is_declared_is_what_is_defined(case: Case, shape: tuple[int, ...]) -> None:
    seed = zlib.crc32(f"{name_of(case)} {shape}".encode())
    for dtype, tolerance in (("float64", 1e-13), ("float32", 3e-6)):
        kind = FLOATS[dtype]
        stored = [store(values.ravel(), kind) for values in values_of(shape, case, seed)]
        exact = [load(each, kind, dtype).astype(np.float64).reshape(shape) for each in stored]
        base = exact.pop() if case.base else None
        ours = merged(numpy_kernel(), work_of(case, stored, shape, kind, seed), stored)
        parameters, whole = case.parameters, case.whole
        theirs = arcee_definitions.merge(case.method, exact, base, parameters, whole, seed=seed).ravel()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max(), err_msg=dtype)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_all_backends_merge_to_the_same_bits(case: Case) -> None:
    """Whatever the slices, spans and blocks are; also where they cut rows."""
    shape = (37, 3001)
    seed = zlib.crc32(name_of(case).encode())
    stored = [store(values.ravel(), BF16) for values in values_of(shape, case, seed, 0.1)]
    work = work_of(case, stored, shape, BF16, seed)
    expected = merged(numpy_kernel(), work, stored, step=4 * CHUNK)
    for spans, step in (((), CHUNK), ((CHUNK, 3 * CHUNK), 2 * CHUNK)):
        assert merged(numpy_kernel(1, CHUNK), work, stored, spans, step).tobytes() == expected.tobytes()
    for tensor_type in ("pt", "pd"):
        same_values(merged(choose(Device(tensor_type)), work, stored, (2 * CHUNK,)), expected, tensor_type)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case("dare_ties", DENSE), "bfloat16"),
        (Case("dare_ties", DENSE), "float64"),
        (Case("della", RANKED), "bfloat16"),
        (Case("sce", whole={"select_topk": 0.3}), "bfloat16"),
        (Case("ramplus_tl", whole={"epsilon": 0.03}), "bfloat16"),
        (Case("arcee_fusion", models=1), "bfloat16"),
        (Case("nuslerp", W, {"nuslerp_flatten": False}, 2), "bfloat16"),
        (Case("nuslerp", W, {"nuslerp_flatten": False, "nuslerp_row_wise": True}, 2), "bfloat16"),
    ],
    ids=str,
)
def test_compiled_loops_merge_to_the_same_bits(case: Case, dtype: str) -> None:
    """Or what stands in for them: each kind of measure once."""
    shape, kind = (23, 3001), FLOATS[dtype]
    stored = [store(values.ravel(), kind) for values in values_of(shape, case, 3, 0.1)]
    work = work_of(case, stored, shape, kind, 5)
    expected = merged(numpy_kernel(), work, stored)
    same_values(merged(CompiledKernel(), work, stored, (CHUNK,)), expected, case.method)


@pytest.mark.parametrize(("shape", "scale"), [((23, 3001), 2000.0), ((23001, 3), 30.0), ((69003,), 1e-3)], ids=str)
def test_divergences_of_all_kinds_of_rows_have_the_same_bits(shape: tuple[int, ...], scale: float) -> None:
    """Rows whose exponentials overflow, models far from the base, short rows, and a row that slices cut."""
    case = Case("arcee_fusion", models=1)
    stored = [store(values.ravel() * scale, BF16) for values in values_of(shape, case, 3, 0.1)]
    work = work_of(case, stored, shape, BF16)
    expected = merged(numpy_kernel(), work, stored)
    same_values(merged(CompiledKernel(), work, stored, (CHUNK,)), expected, str(shape))
    same_values(merged(numpy_kernel(1, CHUNK), work, stored, (CHUNK,)), expected, str(shape))


@pytest.mark.parametrize("case", [Case("sce", whole={"select_topk": 0.3}), Case("arcee_fusion", models=1)], ids=name_of)
def test_compiled_passes_go_to_other_processes(case: Case) -> None:
    """As Ray sends them."""
    shape = (23, 3001)
    stored = [store(values.ravel(), BF16) for values in values_of(shape, case, 3, 0.1)]
    work = work_of(case, stored, shape, BF16)

    def sent(procedure: Procedure) -> Procedure:
        pass_ = next(procedure)
        while True:
            found = yield pickle.loads(pickle.dumps(pass_))
            try:
                pass_ = procedure.send(found)
            except StopIteration:
                return

    expected = merged(CompiledKernel(), work, stored)
    assert drive(work, stored, procedure=sent(CompiledKernel().merge(work)))[0].tobytes() == expected.tobytes()


def test_expressions_keep_no_hash_that_is_another_one_elsewhere() -> None:
    expression = arcee.applied("sce", [{}, {}], {}).chain.combine
    assert {expression: 1}[pickle.loads(pickle.dumps(expression))] == 1
    assert b"_hash" not in pickle.dumps(expression)


def test_kernels_that_a_setting_switches_on_are_compiled_ahead() -> None:
    measured = [len(method.merged_measures) for method in every_chain(["sce"], 2)]
    assert measured == [1, 2]


def test_methods_go_to_other_processes() -> None:
    for case in CASES:
        method = arcee.applied(case.method, case.parameters, case.whole)
        assert pickle.loads(pickle.dumps(method)) == method


# What is not finite ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_what_is_not_finite_reaches_the_output(case: Case) -> None:
    """The element, at least; methods that measure may spread it."""
    if any(own.get("density", 1.0) <= 0 for own in case.parameters) or case.whole.get("select_topk") == 0:
        pytest.skip("drops all elements")
    shape = (5, 20)
    values = values_of(shape, case, 1)
    for each in values:
        each[1, 2] = np.nan
    stored = [store(each.ravel(), F32) for each in values]
    result = merged(numpy_kernel(), work_of(case, stored, shape, F32), stored)
    assert np.isnan(result).any()


# What is asked for ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "each", "whole", "match"),
    [
        ("linear", [{"weight": 1.0}, {"weight": -1.0}], {}, "weights of linear sum to zero"),
        ("multislerp", [{"weight": 1.0}, {"weight": -1.0}], {}, "weights of multislerp sum to zero"),
        ("della", [{"weight": 1.0, "density": 0.1}], {}, "from density − epsilon = -0.05"),
        ("della", [{"weight": 1.0, "density": 0.95}], {}, "to density \\+ epsilon = 1.1"),
    ],
)
def test_what_cannot_be_is_said(method: str, each: Any, whole: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        arcee.applied(method, each, whole)


def test_a_density_of_1_drops_nothing() -> None:
    for name in arcee_definitions.SPARSIFIERS:
        method = arcee.applied(name, [{"weight": 1.0, "density": 1.0}, {"weight": 0.5}], {})
        assert method.sparsifier is None
        assert not method.reads_twice


def test_a_sum_of_weights_near_zero_is_not_divided_by() -> None:
    method = arcee.applied("task_arithmetic", [{"weight": 1.0}, {"weight": -1.0}], {"normalize": True})
    assert method.weights == (1.0, -1.0)


def test_nothing_is_read_twice_without_need() -> None:
    once = {"linear", "task_arithmetic", "nearswap", "ram", "passthrough"}
    for case in CASES:
        method = arcee.applied(case.method, case.parameters, case.whole)
        if case.method in once:
            assert not method.reads_twice, case.method
    dare = arcee.applied("dare_linear", [{"weight": 1.0, "density": 0.5}], {"rescale": False})
    assert not dare.reads_twice
    assert math.isclose(dare.numbers_of(0)["reserve_p"], 0.5)
