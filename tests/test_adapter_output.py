"""Merged differences saved as one adapter: exact products, the nearest ones of a rank, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapting import DOWN, SHAPES, UP, Q, adapter_of, make_base, noise
from conftest import Said, array, make_model, read_file, read_model, snapshot, start
from definitions import applied, merge_tensor
from test_resume import KILLED_AFTER, SPAN

import modelfuse
from modelfuse.checkpoints.adapters import factored
from modelfuse.checkpoints.tensors import StoredTensor
from modelfuse.dtypes import F32
from modelfuse.kernels.compiled import merge_loops
from modelfuse.kernels.compiled.truncated_svd import factorize
from modelfuse.storage.files import SourceFile

PREFIX = "base_model.model."


def product(folder: Path, module: str) -> np.ndarray:
    """B·A of the output; its scale is one."""
    tensors = read_file(folder / "adapter_model.safetensors")[0]
    a, b = (array(tensors[f"{PREFIX}{module}.lora_{part}.weight"]) for part in "AB")
    config = json.loads((folder / "adapter_config.json").read_text())
    rank = config["rank_pattern"].get(module, config["r"])
    assert a.shape[0] == b.shape[1] == rank == config["alpha_pattern"].get(module, config["lora_alpha"])
    multiplied: np.ndarray = b.astype(np.float64) @ a
    return multiplied


@pytest.mark.parametrize("kind", ["noise", "decaying", "of rank three", "zero"])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(60, 40, 5), (30, 70, 30), (200, 120, 16)])
def test_factors_are_as_good_as_the_best(kind: str, rows: int, columns: int, rank: int) -> None:
    """numpy's singular values tell how good the best are."""
    matrix = noise(1, (rows, columns)).astype(np.float64)
    if kind == "decaying":
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
        matrix = (u * np.exp(-np.arange(s.size) / 5)) @ v
    elif kind == "of rank three":
        matrix = matrix[:, :3] @ matrix[:3]
    elif kind == "zero":
        matrix[:] = 0
    single = matrix.astype(np.float32)
    left, right = factorize(single, rank, 7)
    assert (left.shape, right.shape) == ((rows, rank), (rank, columns))
    best = np.sqrt(np.square(np.linalg.svd(single.astype(np.float64), compute_uv=False)[rank:]).sum())
    missed = np.linalg.norm(single - left @ right)
    assert missed <= best * 1.01 + 1e-6 * np.linalg.norm(single)
    assert all(np.array_equal(*pair) for pair in zip(factorize(single, rank, 7), (left, right), strict=True))


def test_linear_is_exact_by_concatenation(tmp_path: Path, merge: Callable[..., Said]) -> None:
    base, _ = make_base(tmp_path / "base")
    first, one = adapter_of(tmp_path / "L1", 1, Q, DOWN)
    second, two = adapter_of(tmp_path / "L2", 11, Q)
    words = ["--model_path_list", first, second, "--base_model_path", base, "--weight_list", 0.5, -2]
    merge(*words, "--output_format", "lora", "--output_path", tmp_path / "A")
    assert sorted(path.name for path in (tmp_path / "A").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "merge_config.json", "merge_report.json",
    ]  # fmt: skip
    want = 0.5 * one[f"{Q}.weight"] - 2.0 * two[f"{Q}.weight"]
    np.testing.assert_allclose(product(tmp_path / "A", Q), want, rtol=0, atol=1e-6)
    np.testing.assert_allclose(product(tmp_path / "A", DOWN), 0.5 * one[f"{DOWN}.weight"], rtol=0, atol=1e-6)
    merge(*words, "--output_path", tmp_path / "C")
    merge("--lora_model_path", tmp_path / "A", "--base_model_path", base, "--output_path", tmp_path / "D")
    whole, through = read_model(tmp_path / "C"), read_model(tmp_path / "D")
    assert all(np.allclose(array(whole[name]), array(through[name]), rtol=0, atol=1e-6) for name in SHAPES)
    assert modelfuse.verify(tmp_path / "A", full=True).holds


def test_other_methods_are_cut_to_a_rank_and_the_error_is_told(tmp_path: Path) -> None:
    base, tensors = make_base(tmp_path / "base", shapes={name: each for name, each in SHAPES.items() if len(each) > 1})
    first, one = adapter_of(tmp_path / "L1", 1, Q, UP)
    full = {name: each + (noise(5, each.shape, 0.1) if "proj.weight" in name else 0) for name, each in tensors.items()}
    model = make_model(tmp_path / "full", full)
    settings: dict[str, Any] = {
        "model_path_list": [first, model], "base_model_path": base, "merge_method": "ties", "output_format": "lora",
    }  # fmt: skip
    budgets: list[dict[str, Any]] = [{}, {"n_process": 3, "memory": 1}]
    for number, other in enumerate(budgets):
        modelfuse.merge(**settings, lora_rank=3, output_path=tmp_path / f"A{number}", **other)
    assert read_file(tmp_path / "A0" / "adapter_model.safetensors") == read_file(
        tmp_path / "A1" / "adapter_model.safetensors"
    )
    recipe = modelfuse.Recipe.parse(settings)
    report = json.loads((tmp_path / "A0" / "merge_report.json").read_text())["tensors"]
    for module in (Q, UP):
        name = f"{module}.weight"
        want = merge_tensor([one[name], full[name] - tensors[name]], None, recipe.method, name)
        values = np.linalg.svd(want.astype(np.float64), compute_uv=False)
        best = np.sqrt(np.square(values[3:]).sum())
        missed = np.linalg.norm(want - product(tmp_path / "A0", module))
        assert missed <= 1.01 * best
        told = report[f"{PREFIX}{module}.lora_A.weight"]["relative_error"]
        assert told == pytest.approx(missed / np.linalg.norm(want), rel=1e-4)
    assert modelfuse.verify(tmp_path / "A0", full=True).holds


def test_what_is_refused(tmp_path: Path, refuse: Callable[..., str]) -> None:
    kernel = "model.layers.0.conv.weight"
    base, tensors = make_base(tmp_path / "base", shapes=SHAPES | {kernel: (2, 3, 4)})
    adapter, _ = adapter_of(tmp_path / "L", 1, Q)
    lora = ["--output_format", "lora", "--output_path", tmp_path / "A"]
    both = ["--model_path_list", adapter, adapter, "--base_model_path", base]
    refuse("merge", *both, "--merge_method", "ties", *lora, says=["has to be cut"], hint="--lora_rank")
    refuse("merge", *both, "--lora_rank", 0, *lora, says=["lora_rank is"])
    refuse("merge", *both, "--lora_rank", 4, "--output_path", tmp_path / "A", says=["lora_rank"], hint="output_format")
    refuse("merge", "--model_path_list", base, base, *lora, says=["base_model_path is not given"])
    same = ["--model_path_list", base, base, "--base_model_path", base]
    refuse("merge", *same, *lora, says=["No model changes any tensor"])
    model = make_model(tmp_path / "full", {name: each + 1 for name, each in tensors.items()})
    words = ["--model_path_list", model, adapter, "--base_model_path", base, "--lora_rank", 2]
    refuse("merge", *words, *lora, says=["cannot hold", kernel], hint="output_format")


@pytest.mark.parametrize("form", [[], ["--output_format", "lora", "--lora_rank", 2]], ids=["model", "lora"])
def test_a_killed_merge_is_gone_on_with(tmp_path: Path, merge: Callable[..., Said], form: list[object]) -> None:
    """With the same bytes, and the errors of what was factorized before in the report."""
    base, _ = make_base(tmp_path / "base")
    first, _ = adapter_of(tmp_path / "L1", 1, Q, DOWN)
    second, _ = adapter_of(tmp_path / "L2", 11, Q)
    words = ["--model_path_list", first, second, "--base_model_path", base, "--merge_method", "ties", *form]
    words += ["--output_path", tmp_path / "out" / "C", "--n_process", 1]
    merge(*words)
    expected = snapshot(tmp_path / "out" / "C")
    shutil.rmtree(tmp_path / "out")
    with start("merge", *words, code=KILLED_AFTER.format(span=SPAN, spans=3)) as process:
        _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    assert "Resuming" in merge(*words).err
    assert snapshot(tmp_path / "out" / "C") == expected


@pytest.mark.parametrize("sparsify_type", [None, "trim", "dare", "magprune"])
@pytest.mark.parametrize("merge_type", ["linear", "ties", "slerp"])
def test_differences_of_several_pieces_merge_as_the_definition_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge_type: str, sparsify_type: str | None
) -> None:
    """What is measured of a tensor is measured of all of its pieces; here each is larger than the next."""
    monkeypatch.setattr(factored, "PIECE", merge_loops.CHUNK)
    sizes = np.repeat([64.0, 8.0, 1.0], merge_loops.CHUNK)[: 2 * merge_loops.CHUNK + 77]
    sources, values = [], []
    for seed in range(2):
        draw = np.random.default_rng(seed).integers(-15, 16, sizes.size)  # One magnitude a bin: ranks are exact.
        values.append((draw * sizes).astype(np.float32))
        (tmp_path / f"{seed}").write_bytes(values[-1].tobytes())
        file = SourceFile.at(tmp_path / f"{seed}")
        sources.append(StoredTensor("w", F32, (sizes.size,), file, 0))
    method = applied(merge_type, sparsify_type, (1.0, 0.5), normalize=False, reserve_p=0.5)
    merged = factored.merge_whole("w", sources, method, strict=True)
    expected = merge_tensor(values, None, method, "w")
    if merge_type == "slerp":
        np.testing.assert_allclose(merged, expected, rtol=2e-6, atol=1e-6)
    else:
        np.testing.assert_array_equal(merged, expected)
