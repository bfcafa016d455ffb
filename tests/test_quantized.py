"""Quantized checkpoints that are refused: by name, before any work, with the way out; and what is no such thing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CONFIG, Said, Stored, array, bf16, make_model, read_model
from test_fp8 import BLOCKS, E4M3, STATIC, codes_of, scale_for, stored

torch: Any = pytest.importorskip("torch")
Refuse = Callable[..., str]
Tensors = Mapping[str, np.ndarray | Stored]
WEIGHT = "model.layers.0.mlp.up_proj.weight"
PLAIN: Tensors = {WEIGHT: bf16(np.ones((4, 6)))}
CODES, SCALE = stored(codes_of((150, 140), 1)), stored(scale_for((2, 2), 1))


@pytest.fixture
def refused(refuse: Refuse, tmp_path: Path) -> Callable[..., str]:
    """A model that must be refused, also as the base and beside a sound one."""

    def check(tensors: Tensors, config: Mapping[str, Any] | None, says: list[Any], hint: str = "unquantized") -> str:
        bad = make_model(tmp_path / "Q", tensors, config=config)
        good = [make_model(tmp_path / name, PLAIN) for name in "AB"]
        refuse("merge", "--model_path_list", *good, "--base_model_path", bad, "--output_path", tmp_path / "C",
               says=[bad, *says], hint=hint)  # fmt: skip
        return refuse("check", "--model_path_list", good[0], bad, says=[bad, *says], hint=hint)

    return check


@pytest.mark.parametrize(
    ("declared", "method", "hint"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq", "unquantized"),
        ({"quant_method": "awq"}, "awq", "unquantized"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", "dequantize()"),
        ({"load_in_8bit": True}, "bitsandbytes", "dequantize()"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors", "run_compressed"),
        ({"quant_method": "mxfp4"}, "mxfp4", "Mxfp4Config"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "modelopt", "unquantized"),
        ({"quant_method": "made-up-yesterday"}, "made-up-yesterday", "unquantized"),
        ({"weight_quantize_algo": "weight_only_int8"}, "weight_only_int8", "unquantized"),
        ({"bits": 4}, "unknown", "unquantized"),
        ("gptq", "unknown", "unquantized"),
        ({"quant_method": ["fp8"]}, "unknown", "unquantized"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["top", "nested", "old key"])
def test_declared_methods(refused: Callable[..., str], declared: object, method: str, hint: str, place: str) -> None:
    configs = {"top": {"quantization_config": declared}, "nested": {"text_config": {"quantization_config": declared}},
               "old key": {"compression_config": declared}}  # fmt: skip
    refused(PLAIN, configs[place], [f"quant_method {method}"], hint)


@pytest.mark.parametrize(
    ("names", "method"),
    [
        ({"qweight": np.int32, "qzeros": np.int32, "scales": np.float16, "g_idx": np.int32}, "(GPTQ)"),
        ({"qweight": np.int32, "qzeros": np.int32, "scales": np.float16}, "(GPTQ or AWQ)"),
        ({"weight_scale": np.float16, "weight_packed": np.int32, "weight_shape": np.int64}, "(compressed-tensors)"),
        ({"quant_weight": np.int8, "quant_scale": np.float32}, "Paddle's weight-only"),
        ({"weight": np.uint8, "weight.absmax": np.float32, "weight.quant_map": np.float32,
          "weight.quant_state.bitsandbytes__nf4": np.uint8}, "bitsandbytes"),
        ({"weight": np.int8, "SCB": np.float32}, "bitsandbytes"),
        ({"gate_up_proj_blocks": np.uint8, "gate_up_proj_scales": np.uint8}, "MXFP4"),
        ({"weight": np.int8, "weight_scale": np.float32}, "scales"),
        ({"weight": np.float32, "weight_scale_inv": np.float32}, "scales"),
        ({"codes": np.int16, "codebooks": np.float16}, "AQLM"),
        ({"W_q": np.uint8, "scale": np.float16}, "HQQ"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("config", [None, CONFIG], ids=["no config", "silent"])
def test_names_betray_what_config_does_not_say(
    refused: Callable[..., str], names: dict[str, type], method: str, config: dict[str, Any] | None
) -> None:
    tensors: Tensors = {f"model.layers.0.mlp.{name}": np.zeros((2, 2), kind) for name, kind in names.items()}
    hint = "Mxfp4Config" if method == "MXFP4" else "unquantized"
    refused({**PLAIN, **tensors}, config, [method, "declares no quantization_config"], hint)


def test_a_declared_scheme_does_not_hide_another(refused: Callable[..., str]) -> None:
    tensors = {WEIGHT: CODES, f"{WEIGHT}_scale_inv": SCALE, "model.layers.1.mlp.qweight": np.zeros((2, 2), np.int32)}
    refused(tensors, {"quantization_config": BLOCKS}, ["GPTQ", "declares another scheme"])


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_bits_that_config_does_not_declare(refused: Callable[..., str], dtype: str) -> None:
    bits = stored(torch.zeros(4, 4, dtype=torch.uint8).view(getattr(torch, dtype)))
    refused({WEIGHT: bits}, CONFIG, [WEIGHT, dtype, "how it is scaled"], "quantization_config")


@pytest.mark.parametrize(
    ("tensors", "declared", "says", "hint"),
    [
        ({WEIGHT: CODES}, BLOCKS, [WEIGHT, "without a scale", f"{WEIGHT}_scale_inv"], "whole checkpoint"),
        ({WEIGHT: CODES, f"{WEIGHT}_scale": SCALE, f"{WEIGHT}_scale_inv": SCALE}, BLOCKS, ["two scales"],
         "fetch it again"),
        ({WEIGHT: CODES, f"{WEIGHT}_scale_inv": SCALE}, {**BLOCKS, "weight_block_size": [64, 64]},
         ["[150, 140]", "[2, 2]", "[3, 3]"], "weight_block_size"),
        ({WEIGHT: CODES, f"{WEIGHT}_scale_inv": SCALE}, {**STATIC, "weight_block_size": None},
         ["[2, 2]", "[] or [150, 1]"], "weight_block_size"),
        ({WEIGHT: CODES, f"{WEIGHT}_scale_inv": stored(torch.ones(()))}, BLOCKS, ["[]", "[2, 2]"], "weight_block_size"),
        ({WEIGHT: CODES, f"{WEIGHT}_scale_inv": SCALE}, {**BLOCKS, "weight_block_size": [0, 128]}, ["[0, 128]"],
         "whole numbers"),
        ({WEIGHT: CODES, f"{WEIGHT}_scale_inv": SCALE}, {**BLOCKS, "weight_block_size": "big"}, ["'big'"],
         "whole numbers"),
        ({WEIGHT: CODES, f"{WEIGHT}_scale_inv": np.ones((2, 2), np.int32)}, BLOCKS, ["int32"], "unquantized"),
        ({WEIGHT: np.ones((150, 140), np.int8), f"{WEIGHT}_scale_inv": SCALE}, BLOCKS, ["int8, not fp8"], "packed"),
        ({WEIGHT: np.ones((150, 140), np.float32), f"{WEIGHT}_scale_inv": SCALE}, BLOCKS, ["float32, not fp8"],
         "scaled already"),
        ({**PLAIN, "other.weight_scale_inv": SCALE}, BLOCKS, ["scales without", "other.weight_scale_inv"], "shards"),
        ({WEIGHT: stored(torch.zeros(4, 4, dtype=torch.uint8).view(torch.float8_e8m0fnu))}, BLOCKS,
         [WEIGHT, "float8_e8m0fnu"], "unquantized"),
    ],
)  # fmt: skip
def test_fp8_that_does_not_fit_its_declaration(
    refused: Callable[..., str], tensors: Tensors, declared: dict[str, Any], says: list[str], hint: str
) -> None:
    refused(tensors, {"quantization_config": declared}, says, hint)


def test_parts_that_declare_different_schemes(refused: Callable[..., str]) -> None:
    config = {
        "quantization_config": BLOCKS,
        "text_config": {"quantization_config": {**BLOCKS, "weight_block_size": [64, 64]}},
    }
    refused({WEIGHT: CODES, f"{WEIGHT}_scale_inv": SCALE}, config, ["fp8 and fp8"])


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": None},
        {"quantization_config": {}},
        {"quantization_config": {"weight_quantize_algo": None, "quant_type": None, "quant_round_type": 0}},
    ],
    ids=["null", "empty", "Paddle's record"],
)
def test_what_declares_nothing_is_kept(merge: Callable[..., Said], tmp_path: Path, config: dict[str, Any]) -> None:
    models = [make_model(tmp_path / name, PLAIN, config={**CONFIG, **config}) for name in "AB"]
    merge("--model_path_list", *models, "--output_path", tmp_path / "C")
    assert json.loads((tmp_path / "C" / "config.json").read_text()) == {**CONFIG, **config}


def test_names_that_only_look_quantized(merge: Callable[..., Said], tmp_path: Path) -> None:
    """Weights of an audio codec, a learned scale, an integer table: none of them is quantized."""
    tensors: Tensors = {"encoder.codes": np.ones(3, np.float32), "layer_scale": np.ones(3, np.float32),
               "attn.k_scale": np.ones(1, np.float32), "router.scales": np.ones(3, np.float32),
               "position_blocks": np.arange(3), "gate.W_q": np.ones((2, 2), np.float32)}  # fmt: skip
    models = [make_model(tmp_path / name, tensors) for name in "AB"]
    merge("--model_path_list", *models, "--output_path", tmp_path / "C")
    merged = read_model(tmp_path / "C")
    assert merged.keys() == tensors.keys()
    assert array(merged["encoder.codes"]).tolist() == [1, 1, 1]


def test_scales_of_activations_are_left_out_of_fp8_models_only(merge: Callable[..., Said], tmp_path: Path) -> None:
    tensors: Tensors = {WEIGHT: stored(torch.ones(4, 6).to(E4M3)), f"{WEIGHT}_scale": stored(torch.ones(1)),
               "model.layers.0.mlp.up_proj.input_scale": stored(torch.ones(1)),
               "experts.gate_up_proj_activation_scale": stored(torch.ones(1)),
               "attn.k_scale": np.ones(1, np.float32), "layer_scale": np.ones(3, np.float32),
               "norm.k_scale": np.ones(3, np.float32)}  # fmt: skip
    models = [make_model(tmp_path / name, tensors, config={"quantization_config": STATIC}) for name in "AB"]
    merge("--model_path_list", *models, "--output_path", tmp_path / "C")
    # What has several elements is learned.
    assert read_model(tmp_path / "C").keys() == {WEIGHT, "layer_scale", "norm.k_scale"}


def test_a_configuration_deeper_than_any_is_refused(refuse: Callable[..., str], tmp_path: Path) -> None:
    models = [make_model(tmp_path / name, PLAIN, config=None) for name in "AB"]
    for model in models:
        (model / "config.json").write_text('{"a": ' * 900 + "{}" + "}" * 900)
    words = ("merge", "--model_path_list", *models, "--output_path", tmp_path / "C")
    refuse(*words, says=[models[0] / "config.json", "nested more than 100 levels deep"])
