"""Methods that work on whole matrices: iso_c, by its plain definition, on any backend, slices and workers."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapting import DOWN, UP, Q, adapter_of, make_base
from conftest import Said, Stored, array, bf16, make_model, read_file, read_model
from driving import STORED, load, store

import modelfuse as package
from modelfuse.checkpoints import Checkpoint
from modelfuse.dtypes import BF16, F16, F32, F64, DType
from modelfuse.kernels import (
    Work,
    gram_matrices,
    matrices,
    matrix_result,
    product_pass,
    steps_of,
    tolerance,
    whole_matrix,
)
from modelfuse.kernels.blas_threads import one_thread
from modelfuse.kernels.compiled.backend import merge_procedure
from modelfuse.kernels.matrices import Matrices, memory_of
from modelfuse.methods import registry
from modelfuse.methods.iso_c import ISO_C
from modelfuse.methods.spec import WholeMatrix
from modelfuse.planning.plan import make_plan
from modelfuse.planning.whole_matrices import Cuts
from modelfuse.recipe.recipe import Recipe

Array = np.ndarray[Any, Any]
Run = Callable[..., Said]
WEIGHTS = (0.5, 0.3, 0.7)


def iso_c(total: Array, rank_tolerance: float = 1e-6) -> Array:
    """By its definition: the singular values that count, replaced by their mean."""
    u, sigma, vt = np.linalg.svd(total, full_matrices=False)
    counts = sigma > rank_tolerance * sigma.max(initial=0)
    return sigma[counts].mean() * u[:, counts] @ vt[counts] if counts.any() else np.zeros_like(total)


def weighted(weights: Sequence[float], differences: Sequence[Array]) -> Array:
    found: Array = np.tensordot(weights, np.stack(differences), 1)
    return found


def walk(work: Work, stored: Sequence[Array], most: int = 1 << 18) -> tuple[Array, Array]:
    """Drive the one pass; returns the stored result and the counts of elements that are not finite."""
    assert work.matrices is not None
    (pass_,) = merge_procedure(work)
    state, room = pass_.start(), np.zeros(max(work.matrices.window, 1) * 8, np.uint8)
    out = np.zeros(work.size * work.out.bytes, np.uint8)
    for first, size, writes in steps_of(pass_, state, 0, work.size, most):
        assert size <= work.matrices.window
        raws = np.full((len(stored), work.matrices.window * 8), 0xA5, np.uint8)
        for row, values in zip(raws, stored, strict=True):
            row[: size * values.itemsize] = values[first : first + size].view(np.uint8)
        pass_.apply(state, first, size, raws, room)
        if writes:
            out[first * work.out.bytes : (first + size) * work.out.bytes] = room[: size * work.out.bytes]
    assert pass_.finish(state) is None
    return out.view(STORED[work.out.name]), state.bad


def work_on(cut: Matrices, dtype: DType = F64, out: DType | None = None, **settings: Any) -> Work:
    method = registry.apply(None, ISO_C, WEIGHTS, settings, factor=0.9)
    size = cut.units * cut.rows * cut.columns
    return Work("w", size, (dtype,) * 4, True, out or dtype, method, (), cut)


def tensors(cut: Matrices, seed: int = 0) -> tuple[list[Array], Array]:
    """Differences of three models to a base, and the base."""
    draw, shape = np.random.default_rng(seed), (cut.units, cut.rows, cut.columns)
    return [0.1 * draw.standard_normal(shape) for _ in range(3)], draw.standard_normal(shape)


def merged(cut: Matrices, differences: Sequence[Array]) -> Array:
    """The merged difference, part by part, by the definition."""
    total = weighted(WEIGHTS, differences)
    result = np.zeros_like(total)
    for unit in range(cut.units):
        for outputs in cut.outputs:
            place = (outputs, slice(None)) if cut.out_first else (slice(None), outputs)
            result[unit][place] = 0.9 * iso_c(total[unit][place])
    return result


@pytest.fixture(params=[True, False], ids=["held", "in panels"])
def small_slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a few thousand elements take many slices and panels; results are held, or made panel by panel."""
    for module in (matrices, gram_matrices, matrix_result, whole_matrix, product_pass):
        for name, size in (("SLICE", 1024), ("PANEL", 2048)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(matrices.Demand, "holds", lambda *_: request.param)


CUTS = {
    "tall": Matrices(1, 120, 40),
    "wide": Matrices(1, 40, 120),
    "wide, in panels": Matrices(1, 30, 700),
    "square": Matrices(1, 64, 64),
    "experts": Matrices(5, 33, 64),
    "experts, tall": Matrices(7, 70, 20),
    "halves of the outputs": Matrices(1, 96, 40, parts=(((0, 48),), ((48, 48),))),
    "halves of the outputs, transposed": Matrices(1, 40, 96, False, (((0, 48),), ((48, 48),))),
    "heads together": Matrices(1, 48, 40, parts=(((0, 8), (24, 8)), ((8, 8), (32, 8)), ((16, 8), (40, 8)))),
    "heads together, transposed": Matrices(1, 40, 48, False, (((0, 16), (24, 16)), ((16, 8), (40, 8)))),
    "experts of alternating outputs": Matrices(3, 20, 32, False, (tuple((i, 1) for i in range(0, 32, 2)),
                                                                 tuple((i, 1) for i in range(1, 32, 2)))),
}  # fmt: skip


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_each_matrix_is_merged_as_defined(cut: Matrices) -> None:
    differences, base = tensors(cut)
    models = [base + each for each in differences]
    found, bad = walk(work_on(cut), [each.ravel() for each in (*models, base)])
    np.testing.assert_allclose(found.reshape(base.shape), base + merged(cut, differences), atol=1e-9)
    assert not bad.any()


# The other methods, by definitions over the differences τᵢ, [out, in], as their papers have them. ---------------------


def polar(matrix: Array) -> Array:
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    polar_: Array = u @ vt
    return polar_


def defined_iso_cts(taus: Sequence[Array], weights: Sequence[float]) -> Array:
    taus, rank = [weight * each for weight, each in zip(weights, taus, strict=True)], min(taus[0].shape)
    own = round((rank - int(0.8 * rank)) / len(taus))
    u, sigma, vt = np.linalg.svd(np.sum(taus, 0), full_matrices=False)
    shared = rank - own * len(taus)
    found = [(u[:, :shared], sigma[:shared], vt[:shared])]
    for tau in taus:
        left, size, right = np.linalg.svd(tau - found[0][0] @ (found[0][0].T @ tau), full_matrices=False)
        found.append((left[:, :own], size[:own], right[:own]))
    lefts, sizes, rights = zip(*found, strict=True)
    result: Array = np.concatenate(sizes).mean() * polar(np.hstack(lefts)) @ polar(np.vstack(rights))
    return result


def defined_tsv_m(taus: Sequence[Array], weights: Sequence[float]) -> Array:
    number = min(taus[0].shape) // len(taus)
    parts = [np.linalg.svd(weight * each, full_matrices=False) for weight, each in zip(weights, taus, strict=True)]
    left, right = np.hstack([u[:, :number] for u, _, _ in parts]), np.vstack([vt[:number] for _, _, vt in parts])
    result: Array = polar(left) * np.concatenate([sigma[:number] for _, sigma, _ in parts]) @ polar(right)
    return result


def quadratic(taus: Sequence[Array], weights: Sequence[float]) -> tuple[Array, Array, Array]:
    """C, D and m₀."""
    squares = [each.T @ each / np.sum(each**2) for each in taus]
    scaled = [weight * each for weight, each in zip(weights, taus, strict=True)]
    return np.sum(squares, 0), np.sum([x @ c for x, c in zip(scaled, squares, strict=True)], 0), np.sum(scaled, 0)


def defined_ridge(taus: Sequence[Array], weights: Sequence[float]) -> Array:
    c, d, start = quadratic(taus, weights)
    ridge = 0.3 * len(taus) / len(c)
    result: Array = (d + ridge * start) @ np.linalg.inv(c + ridge * np.eye(len(c)))
    return result


def defined_swudi(taus: Sequence[Array], weights: Sequence[float]) -> Array:
    c, d, start = quadratic(taus, weights)
    eigenvalues, vectors = np.linalg.eigh(c)
    eigenvalues = np.maximum(eigenvalues, 1e-8)
    kept = 1 - np.exp(-1.5 * len(c) / len(taus) * eigenvalues)
    kept[: len(c) - math.ceil(0.85 * len(c))] = 0
    result: Array = start - start @ vectors * kept @ vectors.T + d @ vectors * (kept / eigenvalues) @ vectors.T
    return result


def defined_swudi_a(taus: Sequence[Array], weights: Sequence[float]) -> Array:
    c, d, start = quadratic(taus, weights)
    eigenvalues, vectors = np.linalg.eigh(c)
    eigenvalues = np.maximum(eigenvalues, 1e-8)
    number = math.ceil(np.sum(np.sqrt(eigenvalues)) ** 2 / np.sum(eigenvalues))
    strong = vectors[:, len(c) - number :]
    result: Array = start - start @ strong @ strong.T + d @ strong / eigenvalues[len(c) - number :] @ strong.T
    return result


def defined_iso_c(taus: Sequence[Array], weights: Sequence[float]) -> Array:
    return iso_c(weighted(weights, taus))


DEFINED = {
    "iso_c": defined_iso_c, "iso_cts": defined_iso_cts, "tsv_m": defined_tsv_m, "ridge": defined_ridge,
    "swudi": defined_swudi, "swudi_a": defined_swudi_a,
}  # fmt: skip
LAYERS = {
    "tall": Matrices(1, 70, 40), "wide": Matrices(1, 40, 70), "square": Matrices(1, 50, 50),
    "few outputs": Matrices(1, 12, 64), "transposed": Matrices(1, 70, 40, False),
    "transposed, few outputs": Matrices(1, 64, 12, False),
    "parts": Matrices(1, 60, 48, parts=(((0, 40),), ((40, 10),), ((50, 10),))),
}  # fmt: skip


def made_of(name: str, cut: Matrices, base: Array, differences: Sequence[Array], **more: Any) -> Array:
    method = registry.apply(None, registry.COMBINATIONS[name], more.pop("weights", WEIGHTS), {}, **more)
    work = Work("w", base.size, (F64,) * (len(differences) + 1), True, F64, method, (), cut)
    found, _ = walk(work, [each.ravel() for each in (*(base + each for each in differences), base)])
    made: Array = found.reshape(base.shape) - base
    return made


def layers_of(cut: Matrices, tensor: Array) -> list[Array]:
    """Each part of a tensor of one matrix, as [out, in]."""
    matrix = tensor[0] if cut.out_first else tensor[0].T
    return [matrix[outputs] for outputs in cut.outputs]


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("cut", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("name", DEFINED)
def test_methods_are_as_defined(name: str, cut: Matrices) -> None:
    differences, base = tensors(cut)
    made = made_of(name, cut, base, differences, factor=0.9)
    taus = [layers_of(cut, each) for each in differences]
    for number, layer in enumerate(layers_of(cut, made)):
        expected = 0.9 * DEFINED[name]([each[number] for each in taus], WEIGHTS)
        np.testing.assert_allclose(layer, expected, atol=1e-9)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("cut", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("name", DEFINED)
def test_lambda_may_be_a_share_of_the_sums_norm(name: str, cut: Matrices) -> None:
    """Whatever the size of the weights is, only their proportions count."""
    differences, base = tensors(cut)
    made = made_of(name, cut, base, differences, norm=0.8)
    plain = made_of(name, cut, base, differences)
    mean = sum(WEIGHTS) / len(WEIGHTS)
    total = weighted([weight / mean for weight in WEIGHTS], differences)
    for layer, same, whole in zip(*(layers_of(cut, each) for each in (made, plain, total)), strict=True):
        np.testing.assert_allclose(np.linalg.norm(layer), 0.8 * np.linalg.norm(whole), rtol=1e-9)
        np.testing.assert_allclose(layer / np.linalg.norm(layer), same / np.linalg.norm(same), atol=1e-9)


@pytest.mark.parametrize("name", DEFINED)
@pytest.mark.parametrize("norm", [None, 0.6])
def test_a_model_that_is_the_base_and_none_that_is_not(name: str, norm: float | None) -> None:
    cut = LAYERS["wide"]
    differences, base = tensors(cut)
    differences[1][:] = 0
    assert np.isfinite(made_of(name, cut, base, differences, norm=norm)).all()
    assert not made_of(name, cut, base, [0 * each for each in differences], norm=norm).any()


@pytest.mark.parametrize("name", DEFINED)
@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_low_ranks_stay_low(name: str, shape: tuple[int, int]) -> None:
    """As of adapters: no method makes anything of directions that no model has."""
    draw, cut = np.random.default_rng(5), Matrices(1, *shape)
    pairs = [(draw.standard_normal((1, shape[0], 3)), draw.standard_normal((1, 3, shape[1]))) for _ in range(3)]
    made = made_of(name, cut, np.zeros((1, *shape)), [b @ a for b, a in pairs])[0]
    sigma = np.linalg.svd(made)[1]
    assert sigma[9:].max() < 1e-6 * sigma[0]


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("out", [F64, F32, BF16, F16], ids=str)
def test_the_result_is_rounded_once(dtype: DType, out: DType) -> None:
    cut = CUTS["tall"]
    differences, base = tensors(cut)
    stored = [store(each.ravel(), dtype) for each in (*(base + each for each in differences), base)]
    *models, wide = (load(each, dtype, "float64") for each in stored)
    exact = wide + merged(cut, [(each - wide).reshape(base.shape) for each in models]).ravel()
    found, _ = walk(work_on(cut, dtype, out), stored)
    # But for the last bits of decompositions, which tip a rounding now and then.
    assert np.mean(found != store(exact, out)) < (0.02 if out is not F64 else 1)
    one, other = (load(each, out, "float64") for each in (found, store(exact, out)))
    np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-9)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("name", ["tall", "wide, in panels", "experts"])
def test_slices_change_no_bit(name: str) -> None:
    cut = CUTS[name]
    differences, base = tensors(cut)
    stored = [store(each.ravel(), F32) for each in (*(base + each for each in differences), base)]
    found = [walk(work_on(cut, F32), stored, most)[0].tobytes() for most in (1 << 10, 1 << 14, 1 << 20)]
    assert len(set(found)) == 1


@pytest.mark.parametrize("shape", [(120, 60), (60, 120)])
def test_what_has_no_full_rank_gets_no_noise(shape: tuple[int, int]) -> None:
    """As differences of adapters: singular values that are zero but for rounding are not raised to the mean."""
    cut, draw = Matrices(1, *shape), np.random.default_rng(3)
    differences = [draw.standard_normal((1, shape[0], 4)) @ draw.standard_normal((1, 4, shape[1])) for _ in range(3)]
    base = np.zeros((1, *shape))
    found, _ = walk(work_on(cut), [each.ravel() for each in (*differences, base)])
    np.testing.assert_allclose(found.reshape(base.shape), merged(cut, differences), atol=1e-9)
    assert np.linalg.matrix_rank(found.reshape(shape), tol=1e-6) == 12


def test_models_that_equal_the_base_leave_it_as_it_is() -> None:
    cut = CUTS["tall"]
    base = tensors(cut)[1].ravel()
    assert (walk(work_on(cut), [base] * 4)[0] == base).all()


def test_singular_values_below_the_share_are_dropped() -> None:
    cut, draw = Matrices(1, 8, 8), np.random.default_rng(0)
    u, v = (np.linalg.qr(draw.standard_normal((8, 8)))[0] for _ in range(2))
    total = u @ np.diag([8.0, 4, 2, 1, 0.5, 0.1, 0.01, 0.001]) @ v
    stored = [(total / sum(WEIGHTS)).ravel()] * 3 + [np.zeros(64)]
    found, _ = walk(work_on(cut, rank_tolerance=0.1), stored)
    np.testing.assert_allclose(found.reshape(8, 8), 0.9 * iso_c(total, 0.1), atol=1e-12)


@pytest.mark.parametrize("shape", [(20, 8), (8, 20)])
def test_what_is_not_finite_makes_all_of_its_matrix_so(shape: tuple[int, int]) -> None:
    cut = Matrices(2, *shape)
    differences, base = tensors(cut)
    differences[1][0, 3, 2] = np.inf
    found, bad = walk(work_on(cut), [each.ravel() for each in (*(base + each for each in differences), base)])
    assert bad.tolist() == [0, 1, 0, 0, 160]
    assert np.isnan(found[:160]).all()
    assert np.isfinite(found[160:]).all()


@pytest.mark.parametrize("cut", [Matrices(1, 900, 300), Matrices(1, 300, 900), CUTS["heads together"]])
def test_no_more_memory_is_taken_than_is_told(cut: Matrices) -> None:
    """What numpy allocates; its decompositions take four times a Gram matrix beside that, which is told too."""
    import tracemalloc

    differences, base = tensors(cut)
    stored = [each.ravel() for each in (*(base + each for each in differences), base)]
    walk(work_on(cut), stored)
    tracemalloc.start()
    walk(work_on(cut), stored)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    buffers = cut.window * 8 * 5 + 8 * base.size
    assert peak - buffers < memory_of(cut, ISO_C.matrix or WholeMatrix(lambda *args: args[0]), 3)


def test_blas_is_given_back_its_threads() -> None:
    from threadpoolctl import ThreadpoolController

    def threads() -> set[int]:
        return {each["num_threads"] for each in ThreadpoolController().select(user_api="blas").info()}

    before = threads()
    with one_thread():
        with one_thread():
            assert threads() == {1}
        assert threads() == {1}
    assert threads() == before


def test_blas_has_one_thread_whichever_thread_asks() -> None:
    """threadpoolctl 3.8 ignores all threads but the first, and says nothing: the planner's was, workers had two."""
    from threadpoolctl import ThreadpoolController

    seen: list[int] = []

    def worker() -> None:
        with one_thread():
            seen.extend(each["num_threads"] for each in ThreadpoolController().select(user_api="blas").info())

    before = [each["num_threads"] for each in ThreadpoolController().select(user_api="blas").info()]
    with one_thread():
        pass
    for _ in range(2):
        thread = threading.Thread(target=worker)
        thread.start()
        thread.join()
    assert set(seen) == {1}
    assert [each["num_threads"] for each in ThreadpoolController().select(user_api="blas").info()] == before


# Merges ---------------------------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (31, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.up_proj.weight": (40, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 40),
    "model.layers.0.mlp.gate.weight": (4, 16),
    "model.layers.0.mlp.experts.gate_up_proj": (3, 24, 16),
    "model.norm.weight": (16,),
    "lm_head.weight": (31, 16),
}
MATRICES = [name for name in SHAPES if "proj" in name]


def values_of(seed: int) -> dict[str, Array]:
    base, draw = np.random.default_rng(99), np.random.default_rng(seed)
    return {
        name: (base.standard_normal(shape) + (0.1 * draw.standard_normal(shape) if seed else 0)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


@pytest.fixture
def request_(tmp_path: Path) -> dict[str, Any]:
    """Three models and their base, as settings of a merge by iso_c."""
    config = {"model_type": "llama", "hidden_size": 16, "tie_word_embeddings": False}
    folders = [make_model(tmp_path / f"m{seed}", values_of(seed), config=config) for seed in range(4)]
    return {"model_path_list": folders[1:], "base_model_path": folders[0], "merge_method": "iso_c", "lambda": 1}


def expected(weights: Sequence[float] = (1 / 3,) * 3, factor: float = 1.0) -> dict[str, Array]:
    base, *models = (values_of(seed) for seed in range(4))
    result = {}
    for name, wide in ((name, each.astype(np.float64)) for name, each in base.items()):
        total = weighted(weights, [each[name] - wide for each in models])
        if name not in MATRICES:
            result[name] = wide + total / sum(weights)
        elif total.ndim == 3:
            halves = [[iso_c(half) for half in np.split(unit, 2)] for unit in total]
            result[name] = wide + factor * np.array([np.concatenate(each) for each in halves])
        else:
            result[name] = wide + factor * iso_c(total)
    return result


def outcome(folder: Path, request: dict[str, Any], **settings: Any) -> dict[str, Stored]:
    package.merge(**{**request, **settings}, output_path=folder)
    return read_model(folder)


@pytest.mark.parametrize("tensor_type", ["np", "pt", "pd"])
def test_matrices_of_layers_are_merged_and_others_averaged(
    tmp_path: Path, request_: dict[str, Any], tensor_type: str
) -> None:
    if tensor_type != "np":
        pytest.importorskip({"pt": "torch", "pd": "paddle"}[tensor_type])
    found = outcome(tmp_path / "out", request_, tensor_type=tensor_type, weight_list=[1, 2, 0.5], **{"lambda": 0.8})
    for name, values in expected((1, 2, 0.5), 0.8).items():
        np.testing.assert_allclose(array(found[name]), values, atol=3e-7, err_msg=name)
    reference = outcome(tmp_path / "np", request_, weight_list=[1, 2, 0.5], **{"lambda": 0.8})
    assert {name: each.data for name, each in found.items()} == {name: each.data for name, each in reference.items()}


def test_workers_and_memory_change_no_byte(tmp_path: Path, request_: dict[str, Any]) -> None:
    found = [
        outcome(tmp_path / f"out{number}", request_, **settings)
        for number, settings in enumerate(({}, {"n_process": 1}, {"n_process": 5}, {"memory": 1}))
    ]
    assert all(each == found[0] for each in found)


def test_the_layout_does_not_matter(tmp_path: Path, request_: dict[str, Any]) -> None:
    """Paddle's [in, out] gives the same: each Linear layer is merged as it is the other way round."""
    del request_
    names = [name for name in SHAPES if "self_attn" in name or "mlp.up" in name or "mlp.down" in name]
    config = {"model_type": "llama", "hidden_size": 16, "tie_word_embeddings": False}
    folders = [make_model(tmp_path / f"hf{seed}", {name: values_of(seed)[name] for name in names}, config=config)
               for seed in range(3)]  # fmt: skip
    turned = [
        make_model(tmp_path / f"pd{seed}", {name: values_of(seed)[name].T.copy() for name in names}, config=config)
        for seed in range(3)
    ]
    found = []
    for kind, group in (("hf", folders), ("paddle", turned)):
        request = {"model_path_list": group[1:], "base_model_path": group[0], "merge_method": "iso_c", "lambda": 1}
        found.append(outcome(tmp_path / f"out_{kind}", request, input_layout=[kind]))
    for name in names:
        np.testing.assert_allclose(array(found[0][name]), array(found[1][name]).T, atol=2e-7)


def test_check_and_the_report_tell(tmp_path: Path, request_: dict[str, Any], modelfuse: Run) -> None:
    notes = "\n".join(package.check(**request_).notes)
    assert "weighted mean" in notes
    assert all(name in notes for name in SHAPES if name not in MATRICES)
    outcome(tmp_path / "out", request_)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    for name, entry in report["tensors"].items():
        method = report["methods"][entry["method"] - 1]
        assert method["merge_type"] == ("iso_c" if name in MATRICES else "linear")
        assert entry.get("tolerance") == (1e-5 if name in MATRICES else None)
    assert package.verify(tmp_path / "out", full=True).holds


@pytest.mark.parametrize(("off", "holds"), [(1e-7, True), (1e-2, False)])
def test_verify_allows_for_other_machines(
    tmp_path: Path, request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch, off: float, holds: bool
) -> None:
    """A decomposition on another processor is a little different; the tolerance allows for that, not for more."""
    outcome(tmp_path / "out", request_)
    finish = matrix_result.finish

    def finish_otherwise(solved: Any, block: Array, *args: Any) -> None:
        finish(solved, block, *args)
        block *= 1 + off

    monkeypatch.setattr(whole_matrix, "finish", finish_otherwise)
    found = package.verify(tmp_path / "out", full=True)
    assert found.holds == holds
    if not holds:
        assert {problem.tensor for problem in found.problems} == set(MATRICES)


def test_rules_choose_for_some_tensors(tmp_path: Path, request_: dict[str, Any]) -> None:
    """A rule that names the method means what it matches; others follow the recipe's."""
    base_path = str(request_["base_model_path"])
    rules = [{"tensors": "lm_head.weight", "merge_method": "iso_c"}, {"tensors": "*.gate.weight", "take": base_path}]
    found = outcome(tmp_path / "out", request_, rules=rules)
    base, *models = (values_of(seed)["lm_head.weight"].astype(np.float64) for seed in range(4))
    total = weighted((1 / 3,) * 3, [each - base for each in models])
    np.testing.assert_allclose(array(found["lm_head.weight"]), base + iso_c(total), atol=3e-7)
    gate = "model.layers.0.mlp.gate.weight"
    assert (array(found[gate]) == values_of(0)[gate]).all()
    np.testing.assert_allclose(array(found["model.norm.weight"]), expected()["model.norm.weight"], atol=3e-7)


def test_without_a_base_it_is_refused(request_: dict[str, Any], refuse: Run) -> None:
    models = request_["model_path_list"]
    refuse("check", "--model_path_list", *models, "--merge_method", "iso_c", says=["iso_c", "base"])


def test_weights_without_a_mean_are_refused(request_: dict[str, Any], refuse: Run) -> None:
    words = ("--base_model_path", request_["base_model_path"], "--merge_method", "iso_c", "--weight_list", 1, -1, 0)
    models = request_["model_path_list"]
    refuse("check", "--model_path_list", *models, *words, says=["weight_list sums to zero"], hint="rule")


def test_values_that_are_not_finite_are_told(tmp_path: Path, request_: dict[str, Any], refuse: Run) -> None:
    values = values_of(1)
    values["model.layers.0.mlp.up_proj.weight"][3, 4] = np.nan
    make_model(tmp_path / "m1", values)
    words = ("--base_model_path", request_["base_model_path"], "--merge_method", "iso_c")
    refuse("merge", "--model_path_list", *request_["model_path_list"], *words, "--output_path", tmp_path / "out",
           says=["model.layers.0.mlp.up_proj.weight", "1 in", "m1", "of 640"])  # fmt: skip


def test_a_merge_that_failed_goes_on(tmp_path: Path, request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = outcome(tmp_path / "whole", request_)
    made, solve = [0], whole_matrix.MatrixPass._solve

    def failing(*args: Any) -> Any:
        made[0] += 1
        if made[0] == 3:
            raise OSError("lost")
        return solve(*args)

    monkeypatch.setattr(whole_matrix.MatrixPass, "_solve", failing)
    with pytest.raises(OSError, match="lost"):
        outcome(tmp_path / "out", request_, n_process=1)
    made[0] = 10
    assert outcome(tmp_path / "out", request_, n_process=1) == whole
    parts = 1 + 1 + 1 + 3 * 2  # Of three matrices, and of experts with two fused layers each.
    assert made[0] == 10 + parts - 2


def test_memory_is_in_the_plan(tmp_path: Path) -> None:
    folders = []
    for name in "xyz":
        shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (4000, 2000) for layer in range(2)}
        folders.append(make_model(tmp_path / name, {each: bf16(np.zeros(shape)) for each, shape in shapes.items()}))
    usual = {"model_path_list": folders[1:], "base_model_path": folders[0], "n_process": 2, "memory": "10GB"}
    plan = make_plan(Recipe.parse({**usual, "merge_method": "iso_c"}))
    assert (plan.workers, plan.memory > 2 * 5 * 8 * 2000**2) == (2, True)
    assert make_plan(Recipe.parse({**usual, "merge_method": "iso_c", "memory": plan.memory - 1})).workers == 1


def test_adapters_are_models_as_any(tmp_path: Path) -> None:
    """An iso_c of two adapters is that of the models that they make."""
    base, values = make_base(tmp_path / "base")
    made = [adapter_of(tmp_path / f"a{seed}", seed, Q, UP, DOWN) for seed in (1, 2)]
    models = [folder for folder, _ in made]
    request: dict[str, Any] = {"model_path_list": models, "base_model_path": base, "merge_method": "iso_c", "lambda": 1}
    found = outcome(tmp_path / "out", request, weight_list=[1, 0.5])
    for name, wide in values.items():
        one, other = (changes.get(name, np.zeros_like(wide)) for _, changes in made)
        total = one + 0.5 * other
        np.testing.assert_allclose(array(found[name]), wide + iso_c(total) if total.any() else wide, atol=1e-6)
    # The same as one adapter, as far as its rank goes: four, of two adapters of rank two.
    package.merge(**request, weight_list=[1, 0.5], output_path=tmp_path / "lora", output_format="lora", lora_rank=4)
    factors, _ = read_file(tmp_path / "lora" / "adapter_model.safetensors")
    for module in (Q, UP, DOWN):
        a, b = (array(factors[f"base_model.model.{module}.lora_{part}.weight"]) for part in "AB")
        name = f"{module}.weight"
        np.testing.assert_allclose(b @ a, array(found[name]) - values[name], atol=2e-6)
    assert package.verify(tmp_path / "lora", full=True).holds


GEOMETRY = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
WHOLE = ((0, 8),)


@pytest.mark.parametrize(
    ("architecture", "layout", "name", "shape", "cut"),
    [
        ("llama", "hf", "model.layers.0.mlp.up_proj.weight", (12, 8), Matrices(1, 12, 8)),
        ("llama", "paddle", "model.layers.0.mlp.up_proj.weight", (8, 12), Matrices(1, 8, 12, False)),
        ("llama", "hf", "model.norm.weight", (8,), None),
        ("llama", "hf", "model.layers.0.self_attn.q_proj.bias", (8,), None),
        ("llama", "hf", "model.embed_tokens.weight", (20, 8), None),
        ("llama", "hf", "lm_head.weight", (20, 8), None),
        ("gpt2", "hf", "wpe.weight", (20, 8), None),
        ("bert", "hf", "bert.embeddings.position_embeddings.weight", (20, 8), None),
        ("mixtral", "hf", "model.layers.0.block_sparse_moe.gate.weight", (4, 8), None),
        ("llama", "hf", "score.weight", (2, 8), None),
        ("mamba", "hf", "backbone.layers.0.mixer.A_log", (8, 4), None),
        ("mamba", "hf", "backbone.layers.0.mixer.conv1d.weight", (8, 1, 4), None),
        ("vit", "hf", "vit.patch_embed.proj.weight", (8, 3, 2, 2), Matrices(1, 8, 12)),
        ("gpt2", "hf", "h.0.mlp.c_fc.weight", (8, 12), Matrices(1, 8, 12, False)),
        ("gpt2", "hf", "h.0.attn.c_attn.weight", (8, 24),
         Matrices(1, 8, 24, False, (WHOLE, ((8, 8),), ((16, 8),)))),
        ("phi3", "hf", "model.layers.0.mlp.gate_up_proj.weight", (16, 8), Matrices(1, 16, 8, True, (WHOLE, ((8, 8),)))),
        ("phi3", "hf", "model.layers.0.self_attn.qkv_proj.weight", (16, 8),
         Matrices(1, 16, 8, True, (WHOLE, ((8, 4),), ((12, 4),)))),
        ("qwen2", "paddle", "model.layers.0.self_attn.qkv_proj.weight", (8, 16),
         Matrices(1, 8, 16, False, (((0, 4), (8, 4)), ((4, 2), (12, 2)), ((6, 2), (14, 2))))),
        ("qwen3_moe", "hf", "model.layers.0.mlp.experts.3.up_proj.weight", (12, 8), Matrices(1, 12, 8)),
        ("qwen3_moe", "hf", "model.layers.0.mlp.experts.gate_up_proj", (3, 16, 8),
         Matrices(3, 16, 8, True, (WHOLE, ((8, 8),)))),
        ("qwen3_moe", "hf", "model.layers.0.mlp.experts.down_proj", (3, 8, 6), Matrices(3, 8, 6)),
        ("llama4_text", "hf", "model.layers.0.feed_forward.experts.gate_up_proj", (3, 8, 16),
         Matrices(3, 8, 16, False, (WHOLE, ((8, 8),)))),
        ("llama4_text", "hf", "model.layers.0.feed_forward.experts.down_proj", (3, 6, 8), Matrices(3, 6, 8, False)),
        ("gpt_oss", "hf", "model.layers.0.mlp.experts.gate_up_proj", (3, 8, 4),
         Matrices(3, 8, 4, False, (((0, 1), (2, 1)), ((1, 1), (3, 1))))),
        ("gpt_neox", "hf", "gpt_neox.layers.0.attention.query_key_value.weight", (24, 8),
         Matrices(1, 24, 8, True, tuple(tuple((6 * head + 2 * part, 2) for head in range(4)) for part in range(3)))),
    ],
)  # fmt: skip
def test_tensors_are_cut_into_the_matrices_of_layers(
    architecture: str, layout: str, name: str, shape: tuple[int, ...], cut: Matrices | None
) -> None:
    config = {"model_type": architecture, **GEOMETRY}
    cuts = Cuts([Checkpoint(Path("m"), "safetensors", {}, config=config)], layout)
    found = cuts.of(name, shape)
    assert found == cut
    assert cuts.averaged == ([] if cut is not None else [name])
    if found is not None:
        outputs = np.sort(np.concatenate(found.outputs))
        assert outputs.tolist() == list(range(found.rows if found.out_first else found.columns))


def test_fused_layers_that_nothing_tells_how_to_cut_are_told() -> None:
    cuts = Cuts([Checkpoint(Path("m"), "safetensors", {}, config={"model_type": "falcon"})], "hf")
    assert cuts.of("h.0.self_attention.query_key_value.weight", (24, 8)) == Matrices(1, 24, 8)
    assert "query_key_value" in "".join(cuts.notes())


@pytest.mark.parametrize(
    ("one", "other", "tolerance_", "apart"),
    [([1, 2], [1, 2.5], 0.1, [False, True]), ([np.nan, 1], [np.nan, np.nan], 0.1, [False, True]),
     ([np.inf, 100], [np.inf, 100.5], 0.01, [False, False]), ([0, 1], [-0.0, 1], 0, [False, False])],
)  # fmt: skip
def test_what_counts_as_apart(one: list[float], other: list[float], tolerance_: float, apart: list[bool]) -> None:
    raws = [np.array(each, np.float32).view(np.uint8) for each in (one, other)]
    assert tolerance.apart(raws[0], raws[1], F32, tolerance_).tolist() == apart


# lambda ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "share"), [(None, 0.6), ("norm 0.25", 0.25), ("norm:1", 1.0)])
def test_a_recipe_may_say_a_share_of_the_norm(
    tmp_path: Path, request_: dict[str, Any], given: str | None, share: float
) -> None:
    """Where it says nothing, methods of whole matrices have one of their own."""
    found = outcome(tmp_path / "out", request_, merge_method="ridge", **{"lambda": given})
    base, *models = (values_of(seed) for seed in range(4))
    for name in MATRICES:
        if "experts" in name:
            continue
        total = np.sum([each[name].astype(float) - base[name] for each in models], 0)
        made = array(found[name]).astype(float) - base[name]
        np.testing.assert_allclose(np.linalg.norm(made), share * np.linalg.norm(total), rtol=1e-5)
    np.testing.assert_allclose(array(found["model.norm.weight"]), expected()["model.norm.weight"], atol=3e-7)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["methods"][1]["lambda"] == f"norm {share:g}"
    assert json.loads((tmp_path / "out" / "merge_config.json").read_text())["lambda"] == f"norm {share:g}"
    assert package.verify(tmp_path / "out", full=True).holds


@pytest.mark.parametrize("text", ["norm", "norm x", "norm 0", "norm -1", "nor 0.6", "1e39"])
def test_no_other_text_is_a_factor(request_: dict[str, Any], text: str) -> None:
    with pytest.raises(package.RecipeError, match="lambda is"):
        package.check(**{**request_, "lambda": text})


def test_other_methods_take_no_share_of_a_norm(request_: dict[str, Any]) -> None:
    with pytest.raises(package.RecipeError, match="only methods of whole matrices"):
        package.check(**{**request_, "merge_method": "ties", "lambda": "norm 0.6"})
    # What a recipe says for its matrices is not what rules of other methods have.
    rules = [{"tensors": "*norm*", "merge_method": "ties"}]
    assert package.check(**{**request_, "lambda": "norm 0.6", "rules": rules})
