"""A base quantized and dequantized before an adapter is added."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapting import CONFIG, adapter_of, factors, lora, make_peft, noise
from conftest import array, bf16, make_model, read_model

import modelfuse
from modelfuse.checkpoints.adapters.arrays import narrow, widen
from modelfuse.dtypes import BF16, F16, DType

LAYER = "model.layers.0.mlp.down_proj"
ALGORITHMS = {"weight_only_int8": 127, "weight_only_int4": 7}


def rounded(values: np.ndarray, dtype: DType = BF16) -> np.ndarray:
    return widen(dtype, narrow(dtype, values.astype(np.float32)).view(np.uint8)).reshape(values.shape)


def definition(weights: np.ndarray, greatest: int, group: int, dtype: DType = BF16) -> tuple[np.ndarray, ...]:
    """Codes, scales and the weight from both, of a weight of [out, in]."""
    outputs, inputs = weights.shape
    group = inputs if group < 0 else group
    parts = weights.reshape(outputs, inputs // group, group)
    scales = rounded(np.abs(parts).max(axis=2) / np.float32(greatest), dtype)[..., None]
    ratios = parts / scales
    codes = np.clip(np.sign(ratios) * np.floor(np.abs(ratios) + np.float32(0.5)), -greatest, greatest)
    return codes, scales[..., 0], rounded((codes * scales).reshape(weights.shape), dtype)


def make(tmp_path: Path, weights: np.ndarray, transposed: bool = False, **quantization: Any) -> dict[str, Any]:
    """A base of one quantized layer, and an adapter of it whose product is small and known."""
    stored = bf16(weights.T.copy() if transposed else weights)
    config = {**CONFIG, "source": "paddle"} if transposed else CONFIG
    base = make_model(tmp_path / "base", {f"{LAYER}.weight": stored, "model.norm.weight": bf16(noise(1, (8,)))},
                      config=config)  # fmt: skip
    adapter = make_peft(tmp_path / "L", lora(LAYER, *factors(1, *weights.shape)))
    content = {"quantization_config": {"quantization_linear_list": [LAYER], **quantization}}
    (adapter / "config.json").write_text(json.dumps(content))
    return {"lora_model_path": adapter, "base_model_path": base, "output_path": tmp_path / "C"}


@pytest.mark.parametrize("transposed", [False, True], ids=["[out, in]", "[in, out]"])
@pytest.mark.parametrize("group", [-1, 64, 128])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_base_goes_there_and_back(tmp_path: Path, algorithm: str, group: int, transposed: bool) -> None:
    weights = rounded(noise(2, (24, 256)))
    weights[3] = 0
    settings = make(tmp_path, weights, transposed, weight_quantize_algo=algorithm, group_size=group)
    modelfuse.merge(**settings, merge_with_qdq_base_model=True, n_process=2)
    a, b = factors(1, 24, 256)
    with np.errstate(invalid="ignore"):
        _, _, there_and_back = definition(weights, ALGORITHMS[algorithm], group)
    there_and_back[3] = 0
    want = there_and_back + np.float32(1.5) * (b @ a)
    got = array(read_model(tmp_path / "C")[f"{LAYER}.weight"])
    np.testing.assert_allclose(got.T if transposed else got, want, rtol=2.0**-8, atol=1e-7)
    found = modelfuse.verify(tmp_path / "C", full=True)
    assert found.holds, found.problems


@pytest.mark.parametrize("group", [-1, 64, 128])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_codes_and_scales_are_paddle_s(dtype: DType, algorithm: str, group: int) -> None:
    """The definition against Paddle's own; the order of its codes is the GPU's, so that they are counted."""
    paddle = pytest.importorskip("paddle", reason="compares with Paddle's weight_quantize")
    weights = rounded(noise(3, (64, 256), 0.3), dtype)
    tensor = paddle.to_tensor(weights.T.copy()).astype(str(dtype))
    theirs, scale = paddle.nn.quant.weight_quantize(tensor, algo=algorithm, group_size=group, arch=80)
    codes, scales, _ = definition(weights, ALGORITHMS[algorithm], group, dtype)
    np.testing.assert_array_equal(scale.astype("float32").numpy().reshape(-1, 64), scales.T)
    numbers = theirs.numpy().view(np.uint8).ravel()
    bits = 8 if algorithm.endswith("8") else 4
    numbers = numbers if bits == 8 else np.concatenate([numbers & 15, numbers >> 4])
    counts = np.bincount(numbers, minlength=1 << bits)
    own = np.bincount(codes.astype(np.int64).ravel() % (1 << bits), minlength=1 << bits)
    np.testing.assert_array_equal(np.roll(counts, 1 << (bits - 1)), own)


def test_patterns_choose_what_is_quantized(tmp_path: Path) -> None:
    weights = rounded(noise(2, (8, 64)))
    algorithms = {"weight_only_int8": [".*up_proj"], "weight_only_int4": [".*down_proj"]}
    settings = make(tmp_path, weights, weight_quantize_algo=algorithms, ignore_modules=[".*lm_head.*"])
    modelfuse.merge(**settings, merge_with_qdq_base_model=True)
    a, b = factors(1, 8, 64)
    want = definition(weights, 7, -1)[2] + np.float32(1.5) * (b @ a)
    got = read_model(tmp_path / "C")[f"{LAYER}.weight"]
    np.testing.assert_allclose(array(got), want, rtol=2.0**-8, atol=1e-7)
    ignored = make(tmp_path / "I", weights, weight_quantize_algo=algorithms, ignore_modules=[".*down_proj"])
    modelfuse.merge(**ignored, merge_with_qdq_base_model=True)
    plain = make(tmp_path / "P", weights)
    modelfuse.merge(**plain)
    assert read_model(tmp_path / "I" / "C") == read_model(tmp_path / "P" / "C")


@pytest.mark.parametrize(("quantization", "says"), [
    ({"weight_quantize_algo": "nf4"}, "nf4"),
    ({"weight_quantize_algo": "weight_only_int8", "group_size": 32}, "groups of 32"),
    ({"weight_quantize_algo": "weight_only_int8", "quantization_linear_list": ["model.absent"]}, "model.absent"),
    ({"weight_quantize_algo": "weight_only_int8", "group_size": 128}, "no multiple of 128"),
])  # fmt: skip
def test_what_is_refused(tmp_path: Path, refuse: Callable[..., str], quantization: dict[str, Any], says: str) -> None:
    settings = make(tmp_path, rounded(noise(2, (8, 64))), **quantization)
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    refuse("merge", *words, "--merge_with_qdq_base_model", says=[says])


def test_full_models_beside_it_are_refused(tmp_path: Path, refuse: Callable[..., str]) -> None:
    settings = make(tmp_path, rounded(noise(2, (8, 64))))
    words = ["--model_path_list", settings["base_model_path"], settings["lora_model_path"]]
    words += ["--base_model_path", settings["base_model_path"], "--output_path", tmp_path / "C"]
    refuse("merge", *words, "--merge_with_qdq_base_model", says=["not all models are adapters"])
    adapter_of(tmp_path / "other", 1, LAYER)
