"""The difference of two models as an adapter, with the options of mergekit-extract-lora; loaded by PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Said, array, read_file, read_model

import modelfuse as package

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

Run = Callable[..., Said]
PREFIX, QUERY, HEAD = "base_model.model.", "model.layers.0.self_attn.q_proj", "lm_head.weight"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
SIZES = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes ``base`` and ``tuned`` in the working directory; the change of each matrix has two large directions."""
    monkeypatch.chdir(tmp_path)

    def make(tied: bool = False, rows: int = 12) -> None:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
        model = transformers.LlamaForCausalLM(config).float()
        model.save_pretrained("base")
        if rows != 12:
            model.resize_token_embeddings(rows)
        with torch.no_grad():
            for parameter in model.parameters():
                change = torch.randn_like(parameter) * 0.05
                if parameter.dim() == 2:
                    change = torch.randn(parameter.shape[0], 2) @ torch.randn(2, parameter.shape[1]) * 0.1 + change / 50
                parameter += change
        model.save_pretrained("tuned")

    return make


@pytest.fixture
def extract(modelfuse: Run, tmp_path: Path) -> Callable[..., tuple[dict[str, np.ndarray], dict[str, Any]]]:
    """Extracts into ``out``; the adapter's tensors without their prefix, and its configuration."""

    def run(*words: object) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        said = modelfuse("extract-lora", "--model", "tuned", "--base_model", "base", "--output_path", "out",
                         "--overwrite", *words)  # fmt: skip
        assert said.status == 0, said.err
        tensors = read_file(tmp_path / "out" / "adapter_model.safetensors")[0]
        assert package.verify(tmp_path / "out", full=True).holds
        return (
            {name.removeprefix(PREFIX): array(each) for name, each in tensors.items()},
            json.loads((tmp_path / "out" / "adapter_config.json").read_text()),
        )

    return run


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(torch.tensor([[1, 5, 7, 3]])).logits.numpy()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [12, 15])
@pytest.mark.parametrize("more", [(), ("--embed-lora",)])
def test_peft_loads_it_and_computes_what_the_model_does(
    pair: Any, extract: Any, tied: bool, rows: int, more: tuple[str, ...]
) -> None:
    pair(tied, rows)
    tensors, config = extract("--max-rank", 12, *more)
    base = transformers.LlamaForCausalLM.from_pretrained("base")
    if rows != 12:
        base.resize_token_embeddings(rows)
    adapted = peft.PeftModel.from_pretrained(base, "out").eval()
    tuned = transformers.LlamaForCausalLM.from_pretrained("tuned")
    np.testing.assert_allclose(logits(adapted), logits(tuned), atol=2e-5)
    whole = {"model.embed_tokens", "lm_head"} <= set(config["modules_to_save"])
    assert whole == (not more or rows != 12)
    assert (EMBEDDING in tensors) == whole


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("words", "said"), [((), "lora_only"), (("-e", "k_proj$"), "lora_only"),
                                             (("--save-module", "v_proj"), "lora_only")])  # fmt: skip
def test_biases_come_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extract: Any, words: tuple[str, ...],
                           said: str) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, tie_word_embeddings=False))
    model.save_pretrained("base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not words or "k_proj" not in name:
                parameter += torch.randn_like(parameter) * 0.3
    model.save_pretrained("tuned")
    tensors, config = extract("--max-rank", 12, *words)
    assert config["bias"] == said
    assert f"{QUERY}.base_layer.bias" in tensors
    adapted = peft.PeftModel.from_pretrained(transformers.Qwen2ForCausalLM.from_pretrained("base"), "out").eval()
    np.testing.assert_allclose(logits(adapted), logits(model.eval()), atol=2e-5)
    merged = package.merge(model_path_list=["out"], base_model_path="base", output_path="back")
    assert merged is not None
    back, tuned = read_model(Path("back")), read_model(Path("tuned"))
    bias = f"{QUERY}.bias"
    np.testing.assert_allclose(array(back[bias]), array(tuned[bias]), atol=1e-6)


def test_factors_are_the_best_and_the_scale_may_be_in_one(pair: Any, extract: Any) -> None:
    pair()
    tuned, base = (array(read_model(Path(name))[f"{QUERY}.weight"]) for name in ("tuned", "base"))
    left, sizes, right = np.linalg.svd((tuned - base).astype(np.float64))
    best = (left[:, :2] * sizes[:2]) @ right[:2]
    for words, in_a, in_b in (((), sizes**0.5, sizes**0.5), (("--no-distribute-scale",), sizes, np.ones(8))):
        tensors, config = extract("--max-rank", 2, *words)
        a, b = (tensors[f"{QUERY}.lora_{part}.weight"] for part in "AB")
        np.testing.assert_allclose(b @ a, best, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), in_a[:2], rtol=1e-3)
        np.testing.assert_allclose(np.linalg.norm(b, axis=0), in_b[:2], rtol=1e-3)
        assert config["r"] == config["lora_alpha"] == 2


def test_small_singular_values_are_dropped(pair: Any, extract: Any) -> None:
    pair()
    tensors, config = extract("--max-rank", 6, "--sv-epsilon", 0.6)
    tuned, base = read_model(Path("tuned")), read_model(Path("base"))
    for name in (each for each in base if "proj" in each):
        sizes = np.linalg.svd((array(tuned[name]) - array(base[name])).astype(np.float64), compute_uv=False)
        assert len(tensors.get(name.replace(".weight", ".lora_A.weight"), ())) == (sizes > 0.6).sum()
    ranks = {name.removesuffix(".lora_A.weight"): len(each) for name, each in tensors.items() if "lora_A" in name}
    assert len(set(ranks.values())) > 1
    assert {name: config["rank_pattern"].get(name, config["r"]) for name in ranks} == ranks


def test_modules_are_chosen(pair: Any, extract: Any, modelfuse: Run) -> None:
    pair()
    tensors, config = extract("-i", "self_attn", "-i", "norm$", "-e", "k_proj", "--max-rank", 2)
    assert {name.split(".")[4] for name in tensors if "lora" in name} == {"q_proj", "v_proj", "o_proj"}
    assert set(tensors) >= {NORM, EMBEDDING, HEAD}
    tensors, config = extract("--save-module", "q_proj", "--skip-undecomposable", "--max-rank", 2)
    assert f"{QUERY}.weight" in tensors
    assert not [name for name in tensors if "norm" in name]
    assert set(config["modules_to_save"]) == {"model.embed_tokens", "lm_head", QUERY, QUERY.replace("0", "1")}
    np.testing.assert_array_equal(tensors[f"{QUERY}.weight"], array(read_model(Path("tuned"))[f"{QUERY}.weight"]))
    said = modelfuse("check", "out/merge_config.json")
    assert "Left out by lora_skip_whole: model.layers.*.input_layernorm.weight" in " ".join(said.out.split())


def test_what_cannot_be_is_refused(pair: Any, refuse: Callable[..., str], tmp_path: Path) -> None:
    pair()
    words = ["--model", "tuned", "--base_model", "base", "--output_path", tmp_path / "x"]
    refuse("extract-lora", *words, "-i", "(a", says=["lora_include is '(("])
    refuse("extract-lora", *words, "-e", "proj|norm|embed|head", says=["No model changes any tensor"])
    refuse("extract-lora", *words[:4], says=["extract-lora needs --out-path"])
    refuse("merge", "--model_path_list", "tuned", "--base_model_path", "base", "--output_path", tmp_path / "x",
           "--lora_include", "q", says=["lora_include is given, but output_format is not lora"])  # fmt: skip
