"""Adapters as PEFT itself makes and merges them, and merged adapters as it loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import array, read_model

import modelfuse

WHY = "compares with PEFT"
CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "everything": {"lora_alpha": 7, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "lora_alpha": 7,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3},
        "alpha_pattern": {"q_proj": 5, r"layers\.0\.mlp\..*": 3},
        "target_modules": "all-linear",
    },
    "dora": {"use_dora": True, "target_modules": ["q_proj", "down_proj", "embed_tokens"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
}


@pytest.fixture(scope="module")
def peft() -> Any:
    pytest.importorskip("torch", reason=WHY)
    pytest.importorskip("transformers", reason=WHY)
    return pytest.importorskip("peft", reason=WHY)


@pytest.fixture(scope="module")
def base(peft: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(base: Path, dtype: str = "float32") -> Any:
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))


def train(peft: Any, base: Path, folder: Path, seed: int, dtype: str = "float32", **settings: Any) -> Any:
    """Save an adapter as if it had been trained; returns the model with it."""
    import torch

    torch.manual_seed(seed)
    model = peft.get_peft_model(load(base, dtype), peft.LoraConfig(r=4, **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    return model


def values(model: Any) -> dict[str, np.ndarray]:
    return {name: each.float().numpy() for name, each in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_merge_and_unload(peft: Any, base: Path, tmp_path: Path, case: str, dtype: str) -> None:
    """In float32 to the rounding of sums in another order; bfloat16 is that result rounded once."""
    import torch

    model = train(peft, base, tmp_path / "L", 1, dtype, **CASES[case])
    load(base, dtype).save_pretrained(tmp_path / "base")
    modelfuse.merge(lora_model_path=tmp_path / "L", base_model_path=tmp_path / "base", output_path=tmp_path / "C")
    got = read_model(tmp_path / "C")
    assert {each.dtype for each in got.values()} == {"F32" if dtype == "float32" else "BF16"}
    exact = values(model.float().merge_and_unload())
    assert got.keys() == exact.keys()
    for name, want in exact.items():
        if dtype == "float32":
            np.testing.assert_allclose(array(got[name]), want, rtol=0, atol=3e-7, err_msg=name)
        else:
            once = torch.from_numpy(want).bfloat16().float().numpy()
            near = np.abs(array(got[name]) - want) <= np.abs(once - want) + 1e-6
            assert near.all(), name


@pytest.mark.filterwarnings("ignore")
def test_pytorch_bin(peft: Any, base: Path, tmp_path: Path) -> None:
    model = train(peft, base, tmp_path / "L", 1, target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "B", safe_serialization=False)
    assert (tmp_path / "B" / "adapter_model.bin").is_file()
    for name in "LB":
        modelfuse.merge(lora_model_path=tmp_path / name, base_model_path=base, output_path=tmp_path / f"C{name}")
    assert read_model(tmp_path / "CL") == read_model(tmp_path / "CB")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("words", [
    {"merge_method": "linear", "weight_list": [0.7, -0.4]},
    {"merge_method": "linear", "lora_rank": 5},
    {"merge_method": "dare_ties", "lora_rank": 8},
])  # fmt: skip
def test_peft_loads_what_output_format_lora_saves(peft: Any, base: Path, tmp_path: Path, words: dict[str, Any]) -> None:
    """And merging it gives what merging into the base gives, but for the error that the report tells."""
    train(peft, base, tmp_path / "L1", 1, target_modules=["q_proj", "down_proj", "embed_tokens"])
    train(peft, base, tmp_path / "L2", 2, target_modules=["q_proj"], modules_to_save=["norm"], use_rslora=True)
    models: dict[str, Any] = {"model_path_list": [tmp_path / "L1", tmp_path / "L2"], "base_model_path": base}
    modelfuse.merge(**models, **words, output_path=tmp_path / "A", output_format="lora")
    whole = {name: each for name, each in words.items() if name != "lora_rank"}
    modelfuse.merge(**models, **whole, output_path=tmp_path / "C")
    wanted = {name: array(each) for name, each in read_model(tmp_path / "C").items()}
    got = values(peft.PeftModel.from_pretrained(load(base), tmp_path / "A").merge_and_unload())
    before = values(load(base))
    report = json.loads((tmp_path / "A" / "merge_report.json").read_text())["tensors"]
    assert modelfuse.verify(tmp_path / "A", full=True).holds
    for name, want in wanted.items():
        size, error = float(np.linalg.norm(want - before[name])), float(np.linalg.norm(want - got[name]))
        entries = [each for key, each in report.items() if key.startswith(f"base_model.model.{name[:-7]}.lora_")]
        told = entries[0]["relative_error"] if entries else 0.0
        assert abs(error - told * size) <= 1e-5 * max(size, 1), name
        assert told < (0.9 if "lora_rank" in words else 1e-9), name
