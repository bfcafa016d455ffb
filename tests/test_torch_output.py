"""Outputs in torch's own files: loaded by torch and transformers, verified, resumed, merged again."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Said, array, make_model, random_tensors, read_model

import modelfuse
from modelfuse.checkpoints.formats.torch_reader import read_torch
from modelfuse.checkpoints.formats.torch_writer import frame_torch
from modelfuse.dtypes import BF16, BY_NAME, F32

torch = pytest.importorskip("torch")
Run = Callable[..., Said]


def loaded(path: Path, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True, **options)
    return found


def test_torch_loads_what_safetensors_hold(merge: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["--model_path_list", *pair, "--output_dtype", "bfloat16"]
    merge(*words, "--output_path", tmp_path / "safe")
    merge(*words, "--no_safe_serialization", "--output_path", tmp_path / "out")
    expected = {name: array(each) for name, each in read_model(tmp_path / "safe").items()}
    for options in ({}, {"mmap": True}):
        found = loaded(tmp_path / "out" / "pytorch_model.bin", **options)
        assert list(found) == list(expected)
        for name, values in expected.items():
            assert found[name].is_contiguous()
            assert found[name].data_ptr() % 64 == 0 or not options
            np.testing.assert_array_equal(found[name].float().numpy() if found[name].is_floating_point()
                                          else found[name].numpy(), values)  # fmt: skip
    assert modelfuse.verify(tmp_path / "out", full=True).holds
    modelfuse.merge(model_path_list=[tmp_path / "out", tmp_path / "out"], output_path=tmp_path / "back")
    back = read_model(tmp_path / "back")
    assert all(np.array_equal(array(back[name]), values) for name, values in expected.items())


def test_shards_have_an_index(merge: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    merge("--model_path_list", *pair, "--no_safe_serialization", "--max_shard_size", 300, "--output_path",
          tmp_path / "out")  # fmt: skip
    index = json.loads((tmp_path / "out" / "pytorch_model.bin.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.bin"))
    assert len(files) > 1
    assert set(index["weight_map"].values()) == set(files)
    assert all(re.fullmatch(r"pytorch_model-\d{5}-of-\d{5}\.bin", name) for name in files)
    assert {name for file in files for name in loaded(tmp_path / "out" / file)} == set(index["weight_map"])
    assert modelfuse.verify(tmp_path / "out").holds
    path = tmp_path / "out" / files[0]
    content = bytearray(path.read_bytes())
    tensors, _ = read_torch(path)
    content[next(iter(tensors.values())).offset] ^= 1
    path.write_bytes(content)
    assert "checksum" in [each.kind for each in modelfuse.verify(tmp_path / "out").problems]


def test_every_type_and_shape_is_read_back(tmp_path: Path) -> None:
    kinds = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "C64"]
    shapes: list[tuple[int, ...]] = [(), (3,), (2, 0, 3), (2, 3, 4), (1, 1)]
    tensors = [(f"{kind}.{number}.é", BY_NAME[kind], shape) for kind in kinds for number, shape in enumerate(shapes)]
    frame, path = frame_torch(tensors), tmp_path / "pytorch_model.bin"
    with path.open("wb") as file:
        file.truncate(frame.size)
        for begin, piece in frame.pieces:
            file.seek(begin)
            file.write(piece)
    found = loaded(path)
    assert {name: (str(each.dtype), tuple(each.shape)) for name, each in found.items()} == {
        name: (f"torch.{kind}", shape) for name, kind, shape in tensors
    }
    own, _ = read_torch(path)
    for (name, kind, shape), offset in zip(tensors, frame.offsets, strict=True):
        assert (own[name].dtype, own[name].shape) == (kind, shape)
        assert own[name].offset == offset or not own[name].size
    assert zipfile.ZipFile(path).namelist()[0] == "archive/data.pkl"


def test_files_and_tensors_may_be_larger_than_four_gigabytes(tmp_path: Path) -> None:
    """With holes in place of their bytes; nothing is read of them."""
    rows = (5 << 30) // (2 * 4096)
    tensors = [("large", BF16, (rows, 4096)), ("behind", F32, (4,)), ("last", BF16, (rows, 4096))]
    frame, path = frame_torch(tensors), tmp_path / "pytorch_model.bin"
    with path.open("wb") as file:
        file.truncate(frame.size)
        for begin, piece in frame.pieces:
            file.seek(begin)
            file.write(piece)
        file.seek(frame.offsets[1])
        file.write(np.arange(4, dtype=np.float32).tobytes())
    found = loaded(path, mmap=True)
    assert found["behind"].tolist() == [0, 1, 2, 3]
    assert found["last"].shape == (rows, 4096)
    own, _ = read_torch(path)
    assert tuple(own[name].offset for name, *_ in tensors) == frame.offsets


def test_what_cannot_be_is_refused(tmp_path: Path, refuse: Callable[..., str], pair: tuple[Path, Path]) -> None:
    words = ["--model_path_list", *pair, "--no_safe_serialization", "--output_path", tmp_path / "out"]
    refuse("merge", *words, "--output_format", "pdparams", says=["the layout is Paddle's"])
    model = make_model(tmp_path / "odd", {**random_tensors(1), "counts": np.zeros(3, np.uint32)})
    refuse("merge", "--model_path_list", model, model, *words[3:], says=["counts", "uint32"], hint="safetensors")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transformers_and_peft_load_them(tmp_path: Path, merge: Run, modelfuse: Run) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=12, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    for name in ("a", "b"):
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    merge("--model_path_list", tmp_path / "a", tmp_path / "b", "--no_safe_serialization", "--output_path",
          tmp_path / "out")  # fmt: skip
    model, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").lm_head.weight
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").lm_head.weight
    torch.testing.assert_close(model.lm_head.weight, (half + other) / 2)
    said = modelfuse("mergekit-extract-lora", "--model", tmp_path / "b", "--base-model", tmp_path / "a", "--out-path",
                     tmp_path / "lora", "--no-safe-serialization", "--max-rank", 8)  # fmt: skip
    assert said.status == 0, said.err
    assert (tmp_path / "lora" / "adapter_model.bin").is_file()
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    tokens = torch.tensor([[1, 5, 7]])
    with torch.inference_mode():
        torch.testing.assert_close(adapted(tokens).logits, wanted(tokens).logits, atol=2e-5, rtol=1e-4)
