"""What is in a model, from its headers: the tree, facts, and what is said where it cannot be merged."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CONFIG, Said, bf16, make_model
from test_documents import document

import modelfuse as package
from modelfuse.checkpoints.formats.safetensors import frame_safetensors
from modelfuse.cli.demo import make_models
from modelfuse.dtypes import BF16

Run = Callable[..., Said]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "models"
    make_models(folder)
    return folder


def names(modules: Any, above: str = "") -> list[str]:
    found = []
    for each in modules:
        name = f"{above}{each.name}"
        found += [name, *names(each.modules, f"{name}.")]
    return found


def line(said: Said, word: str) -> str:
    return next(each for each in said.out.splitlines() if word in each)


def test_a_model_is_a_tree_with_repeated_modules_folded(models: Path) -> None:
    found = package.inspect(models / "base")
    tree = names(found.modules)
    assert "model.layers.0-3.self_attn.q_proj.weight" in tree
    assert not [name for name in tree if "layers.1." in name]
    (top,) = found.modules
    assert (top.name, top.tensors, top.parameters) == ("model", len(found.tensors), found.parameters)
    for _, module in top.rows():
        if module.modules:
            assert module.parameters == sum(each.parameters for each in module.modules)
            assert module.bytes == sum(each.bytes for each in module.modules)
    assert found.bytes == sum(each.bytes for each in found.tensors)
    assert (found.layout, found.role, found.remarks) == ("hf", "model", [])
    assert [(tie.name, tie.to) for tie in found.tied] == [("lm_head.weight", "model.embed_tokens.weight")]
    assert found.config["layers"] == 4
    assert found.tokenizer is not None
    assert (found.tokenizer.tokens, found.tokenizer.added) == (257, 1)


def test_only_what_is_alike_is_folded(tmp_path: Path) -> None:
    def small(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    tensors = {f"h.{layer}.w": small(2, 3 if layer == 1 else 2) for layer in (0, 1, 2, 3, 10)}
    tensors |= {"h.3.b": small(1), "a": small(1), "a.b": small(1), "x..y": small(1), ".": small(1)}
    found = package.inspect(make_model(tmp_path / "m", tensors, config=None))
    tree = names(found.modules)
    assert {"h.0,2,10.w", "h.1.w", "h.3.w", "h.3.b", "x..y"} <= set(tree)
    assert sum(each.tensors for each in found.modules) == len(tensors)
    assert [each.kind for each in found.remarks] == ["warning"]


def test_the_command_shows_it_in_80_columns(modelfuse: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = modelfuse("inspect", models / "base")
    assert said.status == 0
    assert "257×128" in line(said, "embed_tokens.weight  ")
    assert "4 alike" in line(said, "layers.0-3")
    assert "tied lm_head.weight is model.embed_tokens.weight" in said.out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    said = modelfuse("inspect", models / "base")
    assert max(len(re.sub(r"\x1b\[\d+m", "", each)) for each in said.out.splitlines()) <= 80
    said = modelfuse("inspect", models / "absent")
    assert said.status == 2
    assert "There is no folder" in said.err


def test_adapters_tell_what_they_change(modelfuse: Run, models: Path, tmp_path: Path) -> None:
    found = package.inspect(models / "lora")
    assert found.adapter is not None
    assert (found.role, found.adapter.rank, found.adapter.base) == ("adapter", 8, str(models / "base"))
    assert [(each.module, each.layers, each.scale) for each in found.adapter.targets] == [
        ("model.layers.*.self_attn.q_proj", 4, 2.0),
        ("model.layers.*.self_attn.v_proj", 4, 2.0),
    ]
    said = modelfuse("inspect", models / "lora")
    assert line(said, "self_attn.v_proj ").split()[1:] == ["lora", "8", "2", "4"]
    config = json.loads((models / "lora" / "adapter_config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps({**config, "use_qalora": True}))
    (other / "adapter_model.safetensors").write_bytes((models / "lora" / "adapter_model.safetensors").read_bytes())
    (remark,) = package.inspect(other).remarks
    assert remark.kind == "problem"
    assert "QA-LoRA" in remark.text


def test_it_says_what_stands_in_the_way(modelfuse: Run, tmp_path: Path) -> None:
    tensors: dict[str, Any] = {
        "model.embed_tokens.weight": bf16(np.zeros((5, 4))),
        "model.layers.0.self_attn.qkv_proj.weight": bf16(np.zeros((8, 4))),
        "model.layers.0.mlp.experts.gate_up_proj": bf16(np.zeros((3, 4, 4))),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32),
        "count": np.zeros(1, np.int64),
    }
    config = {**CONFIG, "num_hidden_layers": 2, "quantization_config": {"quant_method": "gptq"}}
    folder = make_model(tmp_path / "m", tensors, config=config)
    said = modelfuse("inspect", folder)
    assert said.status == 0
    assert f"problem: {folder} is quantized (quant_method gptq)" in said.out
    assert "warning: config.json: num_hidden_layers is 2" in said.out
    assert "fused model.layers.*.self_attn.qkv_proj.weight: q_proj, k_proj, v_proj" in said.out
    assert "gate_up_proj: 3 experts" in said.out
    assert "note: Computed from config.json" in said.out
    assert "note: Not floating point, so they must be equal in all inputs: count." in said.out


def test_a_model_on_a_server_is_looked_at_by_its_header(modelfuse: Run, web: Any) -> None:
    tensors = {"model.layers.0.mlp.up_proj.weight": np.zeros((2000, 500), np.float32)}
    make_model(web.folder / "m", tensors)
    said = modelfuse("inspect", f"{web.url}/m")
    assert said.status == 0, said.err
    assert said.out.startswith(f"{web.url}/m\n")
    assert "2000×500" in said.out
    ends = [int((each.range or "-9999999").rpartition("-")[2])
            for each in web.asked if each.path.endswith("safetensors") and each.method == "GET"]  # fmt: skip
    assert ends
    assert max(ends) < 1_000_000


def test_names_are_strangers_text(modelfuse: Run, tmp_path: Path) -> None:
    deep = ".".join("ab"[n % 2] for n in range(5000))
    tensors = {name: np.zeros(1, np.float32) for name in ("[bold]x[/]", "<script>1</script>", deep)}
    folder = make_model(tmp_path / "m", tensors)
    assert "[bold]x[/]" in modelfuse("inspect", folder).out
    found = package.inspect(folder)
    assert "<script>" not in found._repr_html_()
    assert len(repr(found)) < 300


def test_it_is_one_document(modelfuse: Run, models: Path) -> None:
    for name in ("base", "lora"):
        read = document(modelfuse("inspect", models / name, "--json"), "inspect")
        assert len(read["tensors"]) == sum(each["tensors"] for each in read["shards"])
    assert document(modelfuse("inspect", "--json", "absent"), "error")["status"] == 2
    assert document(modelfuse("inspect", "--json"), "error")["status"] == 2


def test_a_model_of_400_billion_parameters_takes_less_than_a_second(tmp_path: Path) -> None:
    shapes = {"q_proj": (16384, 16384), "k_proj": (1024, 16384), "v_proj": (1024, 16384), "o_proj": (16384, 16384),
              "gate_proj": (53248, 16384), "up_proj": (53248, 16384), "down_proj": (16384, 53248)}  # fmt: skip
    for layer in range(126):
        entries = [(f"model.layers.{layer}.{name}.weight", BF16, shape) for name, shape in shapes.items()]
        frame = frame_safetensors(entries, {})
        with (tmp_path / f"model-{layer + 1:05d}-of-00126.safetensors").open("wb") as file:
            file.write(frame.pieces[0][1])
            os.truncate(file.fileno(), frame.size)
    package.inspect(tmp_path)
    begin = time.process_time()
    found = package.inspect(tmp_path)
    assert time.process_time() - begin < 1
    assert found.parameters > 400e9
    (top,) = found.modules
    assert (top.name, top.copies, len(top.modules)) == ("model.layers.0-125", 126, 7)
