"""fp8 checkpoints: the values that codes and scales stand for, and merges of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from conftest import CONFIG, Said, Stored, array, bf16, make_model, read_model, save_file
from hypothesis import given, settings
from hypothesis import strategies as st

import modelfuse as package
from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.formats.safetensors import read_safetensors
from modelfuse.checkpoints.views.fp8 import FORMATS, SCALE_DTYPES, Fp8Tensor, fits, scales_of, values_of
from modelfuse.dtypes import BF16, BY_NAME, BY_TORCH_NAME

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch", reason="compares with torch's float8 types")
Run = Callable[..., Said]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}


def stored(tensor: torch.Tensor) -> Stored:
    name = str(tensor.dtype).removeprefix("torch.")
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return Stored(BY_TORCH_NAME[name].name, tuple(tensor.shape), data)


def torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, str(BY_NAME[name].torch))
    return dtype


def codes_of(shape: tuple[int, ...], seed: int, dtype: torch.dtype = E4M3) -> torch.Tensor:
    """Codes of finite values, each as likely as any other."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    values = codes.view(dtype)
    return torch.where(values.float().isfinite(), codes, torch.zeros_like(codes)).view(dtype)


def scale_for(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1000)
    return (torch.rand(shape, generator=generator) * 0.01 + 0.001).to(dtype)


def expanded(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """DeepSeek-V3's own conversion, in plain torch: each scale over its block, cut at the edges."""
    rows, columns = codes.shape[-2:]
    wide = scale.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return codes.float() * wide[..., :rows, :columns]


# What codes, scales and blocks stand for


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_those_of_torch(name: str) -> None:
    wanted = torch.arange(256, dtype=torch.uint8).view(torch_dtype(name)).float().numpy()
    made = values_of(BY_NAME[name])
    assert made.dtype == np.float32
    nan = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(made), nan)
    np.testing.assert_array_equal(made[~nan].view(np.uint32), wanted[~nan].view(np.uint32))  # Signs of zeros, too.


@pytest.mark.parametrize("name", SCALE_DTYPES)
def test_scales_are_those_of_torch(name: str) -> None:
    """All 256 of the exponents; of the others, some."""
    if name == "F8_E8M0":
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    else:
        values = torch.cat([scale_for((50,), 1), torch.tensor([0.0, 1e-7, 6e4])]).to(torch_dtype(name))
    made = scales_of(BY_NAME[name], stored(values).data)
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made, values.float().numpy())


def in_file(folder: Path, codes: torch.Tensor, scale: torch.Tensor) -> tuple[StoredTensor, StoredTensor]:
    save_file(folder / "model.safetensors", {"w": stored(codes), "w_scale_inv": stored(scale)})
    tensors, _ = read_safetensors(folder / "model.safetensors")
    return tensors["w"], tensors["w_scale_inv"]


def read(tensor: StoredTensor, start: int, count: int) -> np.ndarray:
    buffer = np.full(count * 4, 0xA5, np.uint8)
    with tensor.open() as reader:
        reader(start, buffer.data)
    return buffer.view(np.float32)


CASES: dict[str, tuple[tuple[int, ...], tuple[int, int] | None, tuple[int, ...]]] = {
    "ragged blocks": ((300, 413), (128, 128), (3, 4)),
    "whole blocks": ((256, 384), (128, 128), (2, 3)),
    "smaller than a block": ((3, 5), (128, 128), (1, 1)),
    "other blocks": ((70, 50), (32, 7), (3, 8)),
    "matrices of blocks": ((3, 150, 140), (128, 128), (3, 2, 2)),
    "more dimensions": ((2, 3, 9, 8), (4, 4), (2, 3, 3, 2)),
    "a tensor": ((30, 40), None, ()),
    "a tensor, as an array": ((30, 40), None, (1,)),
    "a row": ((30, 40), (1, 40), (30, 1)),
    "a row, flat": ((30, 40), (1, 40), (30,)),
    "a matrix": ((5, 6, 7), (6, 7), (5, 1, 1)),
    "a matrix, flat": ((5, 6, 7), (6, 7), (5,)),
    "one column": ((500, 1), (128, 128), (4, 1)),
    "no matrix": ((77,), None, (1,)),
}


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_any_run_of_elements_is_code_times_scale(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    shape, block, scale_shape = CASES[case]
    codes, scale = codes_of(shape, 1, dtype), scale_for(scale_shape, 1)
    if block is None:
        wanted = codes.float() * scale.reshape(-1)[0]
    else:
        grid = (*shape[:-2], *(-(-length // size) for length, size in zip(shape[-2:], block, strict=True)))
        wanted = expanded(codes, scale.reshape(grid), block)
    flat = wanted.numpy().ravel()
    one, other = in_file(tmp_path, codes, scale)
    assert fits(other.shape, one.shape, block)
    tensor = Fp8Tensor.of(one, other, block)
    assert (tensor.shape, tensor.natural, tensor.stored.torch) == (shape, BF16, str(dtype).removeprefix("torch."))
    np.testing.assert_array_equal(read(tensor, 0, tensor.size).view(np.uint32), flat.view(np.uint32))
    random = np.random.default_rng(0)
    for _ in range(60):
        start, stop = sorted(random.integers(0, tensor.size + 1, 2).tolist())
        if start < stop:
            found = read(tensor, start, stop - start)
            np.testing.assert_array_equal(found.view(np.uint32), flat[start:stop].view(np.uint32))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_blocks_of_any_shape(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    lengths, sizes = st.integers(1, 12), st.integers(1, 14)
    shape = tuple(data.draw(st.lists(lengths, min_size=2, max_size=4)))
    block = (data.draw(sizes), data.draw(sizes))
    grid = (*shape[:-2], *(-(-length // size) for length, size in zip(shape[-2:], block, strict=True)))
    codes, scale = codes_of(shape, 3), scale_for(grid, 3)
    tensor = Fp8Tensor.of(*in_file(tmp_path_factory.mktemp("fp8"), codes, scale), block)
    start = data.draw(st.integers(0, tensor.size - 1))
    count = data.draw(st.integers(1, tensor.size - start))
    wanted = expanded(codes, scale, block).numpy().ravel()[start : start + count]
    np.testing.assert_array_equal(read(tensor, start, count).view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_values_are_those_of_transformers(tmp_path: Path, scale_dtype: str) -> None:
    pytest.importorskip("transformers", reason="compares with transformers' own conversion")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, scale = codes_of((256, 384), 5), scale_for((2, 3), 5).to(torch_dtype(scale_dtype))
    wanted = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)  # type: ignore[no-untyped-call]
    tensor = Fp8Tensor.of(*in_file(tmp_path, codes, scale), (128, 128))
    np.testing.assert_array_equal(read(tensor, 0, tensor.size), wanted.numpy().ravel())


# Merges


def fp8_model(
    folder: Path, seed: int, *, quantization: Mapping[str, Any] = BLOCKS, config: Mapping[str, Any] = CONFIG,
    kinds: Mapping[str, str] | None = None, **options: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Write a model of two quantized and two other tensors; returns the values of all."""
    tensors: dict[str, np.ndarray | Stored] = {}
    values = {}
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        codes, scale = codes_of((150, 140), seed * 10 + layer), scale_for((2, 2), seed * 10 + layer)
        if not quantization.get("weight_block_size"):
            scale = scale[:1, :1].reshape(())
        tensors[name], values[name] = (
            stored(codes),
            expanded(codes, scale.reshape(scale.shape or (1, 1)), (128, 128) if scale.ndim else (150, 140)),
        )
        tensors[name + (kinds or {}).get("scale", "_scale_inv")] = stored(scale)
        if quantization.get("activation_scheme") == "static":
            tensors[name.replace("weight", "input_scale")] = stored(torch.tensor(0.5))
            tensors[name.replace("weight", "k_scale")] = stored(torch.tensor(1.0))
    for name, shape in (("model.norm.weight", (140,)), ("model.embed_tokens.weight", (11, 140))):
        values[name] = scale_for(shape, seed).bfloat16()
        tensors[name] = stored(values[name])
    whole = {**config, "torch_dtype": "bfloat16", "quantization_config": dict(quantization)}
    make_model(folder, tensors, config=whole, **options)
    return values


def bf16_model(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """The same tensors without quantization."""
    shapes = {"model.layers.0.mlp.up_proj.weight": (150, 140), "model.layers.1.mlp.up_proj.weight": (150, 140),
              "model.norm.weight": (140,), "model.embed_tokens.weight": (11, 140)}  # fmt: skip
    values = {
        name: scale_for(shape, seed * 7 + number).bfloat16() for number, (name, shape) in enumerate(shapes.items())
    }
    config = {**CONFIG, "torch_dtype": "bfloat16"}
    make_model(folder, {name: stored(each) for name, each in values.items()}, config=config)
    return values


def report_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "merge_report.json").read_text())
    return content


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


@pytest.mark.parametrize(
    ("quantization", "ending"),
    [
        (BLOCKS, "_scale_inv"),
        ({"quant_method": "fp8"}, "_scale_inv"),
        (STATIC, "_scale"),
        ({**STATIC, "weight_block_size": None}, "_scale_inv"),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "_scale"),
    ],
    ids=["blocks", "one by default", "static", "null", "fbgemm"],
)
def test_fp8_and_bfloat16_models_merge(
    merge: Run, modelfuse: Run, tmp_path: Path, quantization: dict[str, Any], ending: str
) -> None:
    """The first model is the lead, so the output has its names and files, but nothing of its quantization."""
    a = fp8_model(tmp_path / "A", 1, quantization=quantization, kinds={"scale": ending})
    b = bf16_model(tmp_path / "B", 2)
    out = tmp_path / "C"
    merge("--model_path_list", tmp_path / "A", tmp_path / "B", "--weight_list", 0.5, 0.25, "--output_path", out)
    merged = read_model(out)
    assert merged.keys() == a.keys()
    for name, tensor in merged.items():
        wanted = (a[name].float() * 0.5 + b[name].float() * 0.25).bfloat16()
        assert tensor.dtype == "BF16"
        np.testing.assert_array_equal(array(tensor), wanted.float().numpy(), err_msg=name)
    assert config_of(out) == {**CONFIG, "torch_dtype": "bfloat16"}
    verified = package.verify(out, full=True)
    assert (verified.problems, verified.recomputed) == ((), 4)

    # Every tensor of every input is accounted for.
    report = report_of(out)
    names = {name for each in report["inputs"][0]["left_out"] for name in each["tensors"]}
    files, _ = read_safetensors(tmp_path / "A" / "model.safetensors")
    assert names | merged.keys() == files.keys()
    assert not names & merged.keys()
    assert "left_out" not in report["inputs"][1]
    assert report["inputs"][0]["tensors"] == len(files)
    assert report["tensors"]["model.layers.0.mlp.up_proj.weight"]["source_dtypes"] == ["F8_E4M3", "BF16"]

    said = modelfuse("check", "--model_path_list", tmp_path / "A", tmp_path / "B")
    assert f"2 tensors are dequantized; {len(names)} scale tensors are left out" in said.out


@pytest.mark.parametrize("method", ["linear", "ties", "della", "dare_ties"])
def test_same_bytes_for_any_workers_slices_and_recipe(merge: Run, tmp_path: Path, method: str) -> None:
    """A tensor of several slices, so that they begin within rows and within blocks."""
    shape, grid = (1700, 413), (14, 4)
    for seed, name in enumerate("ABD"):
        tensors = {"w": stored(codes_of(shape, seed)), "w_scale_inv": stored(scale_for(grid, seed))}
        make_model(tmp_path / name, tensors, config={"quantization_config": BLOCKS})
    words = ["--model_path_list", tmp_path / "A", tmp_path / "B", "--base_model_path", tmp_path / "D",
             "--merge_method", method, "--seed", 5]  # fmt: skip
    merge(*words, "--output_path", tmp_path / "one")
    merge(*words, "--output_path", tmp_path / "two", "--n_process", 3, "--max_tensor_mem", 0.001)
    merge(tmp_path / "one" / "merge_config.json", "--output_path", tmp_path / "three", "--n_process", 2)
    one, two, three = (read_model(tmp_path / name)["w"].data for name in ("one", "two", "three"))
    assert one == two == three
    assert package.verify(tmp_path / "two", full=True).holds


def test_an_fp8_base_of_bfloat16_models(merge: Run, tmp_path: Path) -> None:
    """The base is the lead: its tensors, though fp8, make the output's bfloat16."""
    base = fp8_model(
        tmp_path / "base", 1, config={**CONFIG, "text_config": {"quantization_config": BLOCKS, "dtype": "x"}}
    )
    models = [bf16_model(tmp_path / name, seed) for seed, name in enumerate("AB", 2)]
    out = tmp_path / "C"
    merge("--model_path_list", tmp_path / "A", tmp_path / "B", "--base_model_path", tmp_path / "base",
          "--weight_list", 1, 1, "--output_path", out)  # fmt: skip
    for name, tensor in read_model(out).items():
        x, y, b = models[0][name].float(), models[1][name].float(), base[name].float()
        np.testing.assert_array_equal(array(tensor), ((x - b) + (y - b) + b).bfloat16().float().numpy(), err_msg=name)
    assert config_of(out) == {**CONFIG, "torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}}


def test_another_type_may_be_asked_for(merge: Run, tmp_path: Path) -> None:
    a, b = (fp8_model(tmp_path / name, seed) for seed, name in enumerate("AB"))
    out = tmp_path / "C"
    merge("--model_path_list", tmp_path / "A", tmp_path / "B", "--output_dtype", "float32", "--output_path", out)
    for name, tensor in read_model(out).items():
        np.testing.assert_array_equal(array(tensor), (a[name].float() * 0.5 + b[name].float() * 0.5).numpy())
    assert config_of(out)["torch_dtype"] == "float32"
    assert "quantization_config" not in config_of(out)


def test_scales_in_another_shard(merge: Run, tmp_path: Path) -> None:
    for seed, name in enumerate("AB"):
        fp8_model(tmp_path / name, seed, shards=3)
        fp8_model(tmp_path / f"{name} whole", seed)
    for one, other, out in (("A", "B", "C"), ("A whole", "B whole", "D")):
        merge("--model_path_list", tmp_path / one, tmp_path / other, "--output_path", tmp_path / out)
    parts, whole = read_model(tmp_path / "C"), read_model(tmp_path / "D")
    assert {name: parts[name] for name in whole} == whole
    assert len(report_of(tmp_path / "C")["inputs"][0]["files"]) == 3


def test_pickled_fp8(merge: Run, tmp_path: Path) -> None:
    """In torch's own format, and transposed as a view may be."""
    codes, scale = codes_of((140, 150), 1), scale_for((2, 2), 1)
    (tmp_path / "P").mkdir()
    torch.save({"w": codes.T, "w_scale_inv": scale}, tmp_path / "P" / "pytorch_model.bin")
    (tmp_path / "P" / "config.json").write_text(json.dumps({"quantization_config": BLOCKS}))
    make_model(tmp_path / "A", {"w": stored(torch.zeros(150, 140, dtype=torch.bfloat16))})
    merge("--model_path_list", tmp_path / "A", tmp_path / "P", "--weight_list", 0, 1, "--output_path", tmp_path / "C")
    wanted = expanded(codes.T, scale, (128, 128)).bfloat16().float().numpy()
    np.testing.assert_array_equal(array(read_model(tmp_path / "C")["w"]), wanted)


def test_codes_that_are_shared_with_other_scales(merge: Run, tmp_path: Path) -> None:
    """torch stores what is shared once; a scale of its own makes another tensor of it."""
    codes, scales = codes_of((150, 140), 1), [scale_for((2, 2), seed) for seed in (1, 2)]
    for name in "AB":
        (tmp_path / name).mkdir()
        shared = {"a": codes, "b": codes, "c": codes, "a_scale_inv": scales[0], "b_scale_inv": scales[1],
                  "d": scales[0]}  # fmt: skip
        torch.save(shared, tmp_path / name / "pytorch_model.bin")
        (tmp_path / name / "config.json").write_text(json.dumps({"quantization_config": BLOCKS}))
    merge("--model_path_list", tmp_path / "A", tmp_path / "B", "--output_path", tmp_path / "C")
    merged = read_model(tmp_path / "C")
    assert merged.keys() == {"a", "b", "d"}  # c is a's second name.
    for name, scale in zip("ab", scales, strict=True):
        wanted = expanded(codes, scale, (128, 128)).bfloat16().float().numpy()
        np.testing.assert_array_equal(array(merged[name]), wanted)
    np.testing.assert_array_equal(array(merged["d"]), scales[0].numpy())


def test_a_nan_code_is_a_value_that_is_not_finite(refuse: Callable[..., str], modelfuse: Run, tmp_path: Path) -> None:
    codes, scale = codes_of((150, 140), 1), scale_for((2, 2), 1)
    codes.view(torch.uint8)[7, 3] = 0x7F
    codes.view(torch.uint8)[140, 139] = 0xFF
    for name, each in (("A", codes), ("B", codes_of((150, 140), 2))):
        tensors = {"w": stored(each), "w_scale_inv": stored(scale)}
        make_model(tmp_path / name, tensors, config={"quantization_config": BLOCKS})
    words = ["merge", "--model_path_list", tmp_path / "A", tmp_path / "B", "--output_path", tmp_path / "C"]
    refuse(*words, says=["'w'", "NaN", f"2 in {tmp_path / 'A'}, of 21,000"], hint="--on_nonfinite propagate")
    assert modelfuse(*words, "--on_nonfinite", "propagate").status == 0
    merged = array(read_model(tmp_path / "C")["w"])
    assert np.argwhere(np.isnan(merged)).tolist() == [[7, 3], [140, 139]]


def test_weights_that_were_dequantized_before_config_was_cleaned(merge: Run, tmp_path: Path) -> None:
    """DeepSeek's own conversion script leaves quantization_config behind."""
    for seed, name in enumerate("AB"):
        make_model(
            tmp_path / name, {"w": bf16(np.full((4, 4), seed))}, config={**CONFIG, "quantization_config": BLOCKS}
        )
    merge("--model_path_list", tmp_path / "A", tmp_path / "B", "--output_path", tmp_path / "C")
    assert array(read_model(tmp_path / "C")["w"]).tolist() == [[0.5] * 4] * 4
    assert config_of(tmp_path / "C") == CONFIG


def test_tensors_without_elements(merge: Run, tmp_path: Path) -> None:
    for name in "AB":
        tensors = {"w": stored(torch.zeros(0, 140, dtype=E4M3)), "w_scale_inv": stored(torch.zeros(0, 2)),
                   "v": bf16(np.ones(3))}  # fmt: skip
        make_model(tmp_path / name, tensors, config={"quantization_config": BLOCKS})
    merge("--model_path_list", tmp_path / "A", tmp_path / "B", "--output_path", tmp_path / "C")
    assert read_model(tmp_path / "C")["w"] == Stored("BF16", (0, 140), b"")


def test_memory_and_bytes_are_counted_as_they_are(tmp_path: Path) -> None:
    """A byte an element is read, four are held."""
    paths = [tmp_path / "A", tmp_path / "B"]
    for seed, path in enumerate(paths):
        make_model(path, {"w": stored(codes_of((64, 64), seed)), "w_scale": stored(torch.ones(()))},
                   config={"quantization_config": STATIC})  # fmt: skip
    plan = package.check(model_path_list=paths, n_process=1)
    assert plan.bytes_read == 2 * 64 * 64
    done: list[int] = []
    package.merge(model_path_list=paths, output_path=tmp_path / "C", progress=done.append)
    assert sum(done) == 4 * 64 * 64
    assert math.isclose(plan.memory - package.check(model_path_list=paths, output_dtype="float32", n_process=1).memory,
                        -2 * 64 * 64)  # fmt: skip


def test_transformers_loads_what_was_merged(merge: Run, tmp_path: Path) -> None:
    """As bfloat16, with nothing left to dequantize and no tensor missing or unexpected."""
    transformers = pytest.importorskip("transformers", reason="loads what was merged with transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    plain = transformers.LlamaForCausalLM(config).bfloat16()
    plain.save_pretrained(tmp_path / "B")
    wanted, tensors = {}, {}
    for number, (name, weight) in enumerate(plain.state_dict().items()):
        wanted[name], tensors[name] = weight, stored(weight)
        if "_proj" in name:
            codes = codes_of(tuple(weight.shape), number)
            scale = scale_for(tuple(-(-length // 32) for length in weight.shape), number)
            tensors[name], tensors[f"{name}_scale_inv"] = stored(codes), stored(scale)
            wanted[name] = ((expanded(codes, scale, (32, 32)) + weight.float()) * 0.5).bfloat16()
    quantization = {**BLOCKS, "weight_block_size": [32, 32]}
    make_model(tmp_path / "A", tensors, config={**config_of(tmp_path / "B"), "quantization_config": quantization})
    merge("--model_path_list", tmp_path / "A", tmp_path / "B", "--output_path", tmp_path / "C")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "C", output_loading_info=True)
    assert not any(info.values()), info
    assert not hasattr(loaded.config, "quantization_config")
    found = loaded.state_dict()
    assert {name: each.dtype for name, each in found.items()} == dict.fromkeys(wanted, torch.bfloat16)
    assert all(torch.equal(found[name], each) for name, each in wanted.items())
