"""Modules of sentence-transformers that have weights are merged like the model itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import array, bf16, make_model, read_file, save_file

import modelfuse

MODULES = json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}])
Tensors = dict[str, np.ndarray]


def noise(seed: int, **shapes: tuple[int, ...]) -> Tensors:
    random = np.random.default_rng(seed)
    return {name.replace("_", "."): random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def make(folder: Path, seed: int, dense: Any) -> Path:
    files = {"modules.json": MODULES, "1_Pooling/config.json": "{}", "2_Dense/config.json": "{}"}
    make_model(folder, noise(seed, body_weight=(3, 2)), config={"model_type": "bert"}, files=files)
    save_file(folder / "2_Dense" / "model.safetensors", dense)
    return folder


def test_with_the_same_method_and_weights(tmp_path: Path) -> None:
    dense = [noise(seed, linear_weight=(4, 3), linear_bias=(4,)) for seed in (1, 2)]
    models = [make(tmp_path / name, seed, each) for seed, (name, each) in enumerate(zip("AB", dense, strict=True))]
    modelfuse.merge(model_path_list=models, weight_list=[0.75, 0.25], output_path=tmp_path / "out")
    got = read_file(tmp_path / "out" / "2_Dense" / "model.safetensors")[0]
    for name, each in dense[0].items():
        np.testing.assert_allclose(array(got[name]), 0.75 * each + 0.25 * dense[1][name], rtol=1e-6)
    assert (tmp_path / "out" / "2_Dense" / "config.json").is_file()
    assert modelfuse.verify(tmp_path / "out", full=True).holds


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_a_base(tmp_path: Path, dtype: str) -> None:
    dense = [noise(seed, linear_weight=(4, 3)) for seed in (1, 2, 3)]
    stored = [{name: bf16(each) for name, each in one.items()} for one in dense] if dtype == "bfloat16" else dense
    models = [make(tmp_path / name, seed, each) for seed, (name, each) in enumerate(zip("ABC", stored, strict=True))]
    modelfuse.merge(model_path_list=models[:2], base_model_path=models[2], weight_list=[1, -0.5],
                    output_path=tmp_path / "out")  # fmt: skip
    got = read_file(tmp_path / "out" / "2_Dense" / "model.safetensors")[0]["linear.weight"]
    a, b, base = (one["linear.weight"] for one in dense)
    close = 1e-6 if dtype == "float32" else 0.06
    np.testing.assert_allclose(array(got), base + (a - base) - 0.5 * (b - base), atol=close)
    assert got.dtype == ("F32" if dtype == "float32" else "BF16")


def test_modules_that_differ_are_refused(tmp_path: Path, refuse: Callable[..., str]) -> None:
    one = make(tmp_path / "A", 1, noise(1, linear_weight=(4, 3)))
    other = make(tmp_path / "B", 2, noise(2, linear_weight=(5, 3)))
    refuse("merge", "--model_path_list", one, other, "--output_path", tmp_path / "out",
           says=[f"The module {other / '2_Dense'} does not have the same tensors"])  # fmt: skip
