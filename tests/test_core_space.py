"""Adapters merged by methods of whole matrices in the space that they span."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapting import CONFIG, DOWN, SHAPES, UP, Q, factors, lora, make_base, make_peft, noise
from conftest import Said, array, make_model, read_file, read_model
from test_whole_matrix import DEFINED, made_of, polar

import modelfuse as package
from modelfuse.kernels.matrices import Matrices
from modelfuse.methods.spec import Floats
from modelfuse.planning import matrix_methods
from modelfuse.planning.plan import make_plan
from modelfuse.recipe.recipe import Recipe

OUT = "model.layers.0.self_attn.o_proj"
FUSED = "model.layers.0.self_attn.qkv_proj"
#: Larger than the ranks together, as real layers are; one with few outputs, one with few inputs.
WIDE = {
    f"{Q}.weight": (60, 40), f"{UP}.weight": (24, 70), f"{DOWN}.weight": (70, 24), f"{OUT}.weight": (40, 40),
    f"{FUSED}.weight": (64, 40), "model.norm.weight": (8,),
}  # fmt: skip
RANKS = (2, 5, 3)


def adapters(folder: Path, shapes: dict[str, tuple[int, ...]] = WIDE) -> list[Path]:
    """Of different ranks; the second one lacks a layer."""
    made = []
    for seed, rank in enumerate(RANKS, 1):
        tensors: dict[str, Any] = {}
        for number, (name, shape) in enumerate(shapes.items()):
            if len(shape) == 2 and not (seed == 2 and name.startswith(DOWN)):
                tensors |= lora(name.removesuffix(".weight"), *factors(100 * seed + number, shape[0], shape[1], rank))
        made.append(make_peft(folder / f"L{seed}", tensors, r=rank))
    return made


def products(folder: Path) -> dict[str, Floats]:
    """B·A of every layer, by the weight's name."""
    tensors = {
        name: array(each).astype(np.float64)
        for name, each in read_file(folder / "adapter_model.safetensors")[0].items()
    }
    return {
        name.removeprefix("base_model.model.").replace(".lora_A.", "."): tensors[name.replace("lora_A", "lora_B")]
        @ each
        for name, each in tensors.items()
        if ".lora_A." in name
    }


@pytest.fixture
def in_full(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Floats]]:
    """A merge of large matrices, which nobody makes of adapters: the differences to the base."""

    def merge_in_full(folder: Path, values: dict[str, np.ndarray], request: dict[str, Any]) -> dict[str, Floats]:
        with monkeypatch.context() as patched:
            patched.setattr(matrix_methods, "in_core", lambda name, sources, base, method, matrices, strict: matrices)
            package.merge(**request, output_path=folder)
        return {name: array(each).astype(np.float64) - values[name] for name, each in read_model(folder).items()}

    return merge_in_full


@pytest.mark.parametrize("factor", [{"lambda": 0.7}, {}])
@pytest.mark.parametrize("method", DEFINED)
def test_it_is_what_the_full_space_gives(
    tmp_path: Path, in_full: Callable[..., dict[str, Floats]], method: str, factor: dict[str, Any]
) -> None:
    base, values = make_base(tmp_path / "base", shapes=WIDE)
    request: dict[str, Any] = {
        "model_path_list": adapters(tmp_path), "base_model_path": base, "merge_method": method,
        "weight_list": [1, 0.5, 0.75], **factor,
    }  # fmt: skip
    full = in_full(tmp_path / "full", values, request)
    package.merge(**request, output_path=tmp_path / "lora", output_format="lora")
    package.merge(**request, output_path=tmp_path / "model")
    found, model = products(tmp_path / "lora"), read_model(tmp_path / "model")
    assert found.keys() == {name for name, shape in WIDE.items() if len(shape) == 2}
    for name, product in found.items():
        # Of the full space, products are in float32; weak directions of iso_cts show it.
        atol = 1e-4 if method == "iso_cts" else 3e-6
        np.testing.assert_allclose(product, full[name], atol=atol, err_msg=name)
        np.testing.assert_allclose(array(model[name]), values[name] + product, atol=1e-6, err_msg=name)
        assert np.abs(product).max() > 1e-2
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == sum(RANKS)
    assert config["rank_pattern"] == {DOWN: RANKS[0] + RANKS[2]}
    report = json.loads((tmp_path / "lora" / "merge_report.json").read_text())["tensors"]
    assert all(each["relative_error"] == 0 for name, each in report.items() if "lora_" in name)
    assert all(package.verify(tmp_path / name, full=True).holds for name in ("lora", "model"))


def test_it_is_cut_to_a_rank_as_well_as_can_be(tmp_path: Path) -> None:
    base, _ = make_base(tmp_path / "base", shapes=WIDE)
    request: dict[str, Any] = {
        "model_path_list": adapters(tmp_path), "base_model_path": base, "merge_method": "ridge",
        "output_format": "lora",
    }  # fmt: skip
    package.merge(**request, output_path=tmp_path / "whole")
    whole = products(tmp_path / "whole")
    others: list[dict[str, Any]] = [{}, {"lora_distribute_scale": False}]
    for number, more in enumerate(others):
        package.merge(**request, **more, lora_rank=4, output_path=tmp_path / f"cut{number}")
        report = json.loads((tmp_path / f"cut{number}" / "merge_report.json").read_text())["tensors"]
        for name, product in products(tmp_path / f"cut{number}").items():
            sizes = np.linalg.svd(whole[name], compute_uv=False)
            best = np.sqrt(np.square(sizes[4:]).sum() / np.square(sizes).sum())
            module = name.removesuffix(".weight")
            assert report[f"base_model.model.{module}.lora_A.weight"]["relative_error"] == pytest.approx(best, abs=1e-6)
            missed = np.linalg.norm(product - whole[name]) / np.linalg.norm(whole[name])
            assert missed == pytest.approx(best, abs=1e-5)


def test_directions_that_no_adapter_has_get_nothing(tmp_path: Path, in_full: Callable[..., dict[str, Floats]]) -> None:
    """Where bases are of more vectors than there are directions, as of one adapter given three times."""
    base, values = make_base(tmp_path / "base", shapes=WIDE)
    same = adapters(tmp_path)[0]
    request: dict[str, Any] = {"model_path_list": [same] * 3, "base_model_path": base, "merge_method": "iso_c"}
    package.merge(**request, output_path=tmp_path / "lora", output_format="lora")
    full = in_full(tmp_path / "full", values, request)
    for name, product in products(tmp_path / "lora").items():
        assert np.linalg.matrix_rank(product, tol=1e-5) == RANKS[0]
        np.testing.assert_allclose(product, full[name], atol=3e-6)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_iso_cts_takes_its_share_of_the_directions_that_there_are(shape: tuple[int, int]) -> None:
    """What is left of a model is rounding where the sum's directions have all of it: no directions of its own."""
    draw = np.random.default_rng(5)
    taus = [draw.standard_normal((shape[0], 5)) @ draw.standard_normal((5, shape[1])) for _ in range(3)]
    cut, base, weights = Matrices(1, *shape), np.zeros((1, *shape)), (1.0, 0.5, 0.75)
    found = made_of("iso_cts", cut, base, [each[None] for each in taus], weights=weights)[0]
    taus = [weight * each for weight, each in zip(weights, taus, strict=True)]
    u, sigma, vt = np.linalg.svd(sum(taus), full_matrices=False)
    own, shared = 1, 12  # Of fifteen directions, four fifths are the sum's.
    parts = [(u[:, :shared], sigma[:shared], vt[:shared])]
    for tau in taus:
        left, size, right = np.linalg.svd(tau - parts[0][0] @ (parts[0][0].T @ tau), full_matrices=False)
        parts.append((left[:, :own], size[:own], right[:own]))
    lefts, sizes, rights = zip(*parts, strict=True)
    want = np.concatenate(sizes).mean() * polar(np.hstack(lefts)) @ polar(np.vstack(rights))
    np.testing.assert_allclose(found, want, atol=1e-6)
    once = made_of("iso_cts", cut, base, [taus[0][None]] * 3)[0]
    assert np.linalg.svd(once)[1][5] < 1e-6


def test_ranks_larger_than_a_layer_are_no_more_than_it_has(
    tmp_path: Path, in_full: Callable[..., dict[str, Floats]]
) -> None:
    base, values = make_base(tmp_path / "base")
    shapes = {f"{module}.weight": SHAPES[f"{module}.weight"] for module in (Q, UP, DOWN)}
    request: dict[str, Any] = {
        "model_path_list": adapters(tmp_path, shapes), "base_model_path": base, "merge_method": "tsv_m",
    }  # fmt: skip
    package.merge(**request, output_path=tmp_path / "lora", output_format="lora")
    full = in_full(tmp_path / "full", values, request)
    for name, product in products(tmp_path / "lora").items():
        np.testing.assert_allclose(product, full[name], atol=3e-6, err_msg=name)


def test_a_model_that_is_no_adapter_is_merged_in_full(tmp_path: Path, refuse: Callable[..., str]) -> None:
    base, tensors = make_base(tmp_path / "base", shapes=WIDE)
    model = make_model(
        tmp_path / "full", {name: each + noise(3, each.shape, 0.1) for name, each in tensors.items()}, config=CONFIG
    )
    words = ["--model_path_list", model, adapters(tmp_path)[0], "--base_model_path", base, "--merge_method", "iso_c"]
    refuse(
        "merge", *words, "--output_format", "lora", "--output_path", tmp_path / "A", says=["has to be cut to a rank"]
    )


def test_it_takes_seconds_and_little_memory_at_any_size(
    tmp_path: Path, merge: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a large matrix: the base's layers are not even read."""
    shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (4096, 2048) for layer in range(2)}
    base = make_model(
        tmp_path / "base", {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, config=CONFIG
    )
    paths = adapters(tmp_path, dict(shapes))
    request: dict[str, Any] = {
        "model_path_list": paths,
        "base_model_path": base,
        "merge_method": "iso_cts",
        "n_process": 1,
    }
    plan = make_plan(Recipe.parse({**request, "output_format": "lora"}))
    assert plan.memory - make_plan(Recipe.parse({**request, "merge_method": "linear"})).memory < 30e6
    started = time.process_time()
    package.merge(**request, output_format="lora", output_path=tmp_path / "lora")
    assert time.process_time() - started < 10
    assert products(tmp_path / "lora").keys() == shapes.keys()
    started = time.process_time()
    package.merge(**request, output_path=tmp_path / "model")
    assert time.process_time() - started < 10
    full = make_plan(Recipe.parse(request))
    assert full.memory < 200e6
    sent = pickle.loads(pickle.dumps(full.tensors[0])).matrices.merged  # As nodes of a cluster get it.
    assert full.tensors[0].matrices is not None
    assert full.tensors[0].matrices.merged is not None
    assert all(map(np.array_equal, sent.factors(), full.tensors[0].matrices.merged.factors()))


def test_what_is_not_finite_is_told(tmp_path: Path, refuse: Callable[..., str]) -> None:
    base, _ = make_base(tmp_path / "base", shapes=WIDE)
    bad = lora(Q, *factors(1, 60, 40))
    bad[f"{Q}.lora_A.weight"][0, 0] = np.nan
    paths = [adapters(tmp_path)[0], make_peft(tmp_path / "bad", bad)]
    words = [
        "--model_path_list",
        *paths,
        "--base_model_path",
        base,
        "--merge_method",
        "iso_c",
        "--output_format",
        "lora",
    ]
    refuse("merge", *words, "--output_path", tmp_path / "A", says=["NaN or infinite"])
    package.merge(
        model_path_list=paths, base_model_path=base, merge_method="iso_c", output_format="lora",
        on_nonfinite="propagate", output_path=tmp_path / "A",
    )  # fmt: skip
    assert np.isnan(products(tmp_path / "A")[f"{Q}.weight"]).all()
