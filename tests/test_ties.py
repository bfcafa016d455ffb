"""Output heads tied to the embedding: what changes one end of a pair, and models that do not tie alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import array, make_model, read_model

import modelfuse

pytestmark = pytest.mark.filterwarnings("ignore")
E, H = "model.embed_tokens.weight", "lm_head.weight"
EMBED, OTHER, HEAD = (np.random.default_rng(seed).standard_normal((7, 4)).astype(np.float32) for seed in range(3))
TIED = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
UNTIED = {**TIED, "tie_word_embeddings": False}


def model(folder: Path, config: dict[str, object], embedding: np.ndarray, head: np.ndarray | None = None) -> Path:
    tensors = {E: embedding, "model.norm.weight": np.ones(4, np.float32)}
    return make_model(folder, tensors | ({} if head is None else {H: head}), config=config)


def outcome(tmp_path: Path, **settings: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    modelfuse.merge(**settings, output_path=tmp_path / "out", overwrite=True)
    assert modelfuse.verify(tmp_path / "out", full=True).holds
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    return {name: array(each) for name, each in read_model(tmp_path / "out").items()}, config


def test_a_tied_model_beside_an_untied_one(tmp_path: Path) -> None:
    """Every model's head is its own or its embedding, whichever of them leads."""
    tied, untied = model(tmp_path / "T", TIED, EMBED), model(tmp_path / "U", UNTIED, OTHER, HEAD)
    for models in ([tied, untied], [untied, tied]):
        got, config = outcome(tmp_path, model_path_list=models)
        np.testing.assert_allclose(got[E], (EMBED + OTHER) / 2, rtol=1e-6)
        np.testing.assert_allclose(got[H], (EMBED + HEAD) / 2, rtol=1e-6)
        assert config["tie_word_embeddings"] is False
    assert any("tie_word_embeddings is false" in note for note in modelfuse.check(model_path_list=[tied, untied]).notes)


def test_where_all_heads_equal_their_embeddings_the_output_is_tied(tmp_path: Path) -> None:
    tied, equal = model(tmp_path / "T", TIED, EMBED), model(tmp_path / "U", UNTIED, OTHER, OTHER)
    for models in ([tied, equal], [equal, tied]):
        got, config = outcome(tmp_path, model_path_list=models)
        assert H not in got
        assert config["tie_word_embeddings"] is True


def test_a_text_config_says_it_too(tmp_path: Path) -> None:
    config = {**TIED, "text_config": {"tie_word_embeddings": True, "hidden_size": 4}}
    tied, untied = model(tmp_path / "T", config, EMBED), model(tmp_path / "U", {**config, **UNTIED}, OTHER, HEAD)
    _, made = outcome(tmp_path, model_path_list=[tied, untied], allow_mismatch=True)
    assert made["tie_word_embeddings"] is False
    assert made["text_config"] == {"tie_word_embeddings": False, "hidden_size": 4}


def test_a_config_that_is_silent_means_what_its_class_means(tmp_path: Path) -> None:
    gemma: dict[str, object] = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    one, other = model(tmp_path / "A", gemma, EMBED), model(tmp_path / "B", gemma, OTHER, OTHER)
    got, _ = outcome(tmp_path, model_path_list=[one, other])
    assert H not in got
    untied = model(tmp_path / "C", {**gemma, "tie_word_embeddings": False}, OTHER, HEAD)
    got, config = outcome(tmp_path, model_path_list=[one, untied])
    np.testing.assert_allclose(got[H], (EMBED + HEAD) / 2, rtol=1e-6)
    assert config["tie_word_embeddings"] is False


DIMS = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}  # fmt: skip


def make_tied(folder: Path) -> Any:
    torch = pytest.importorskip("torch", reason="compares with PEFT")
    transformers = pytest.importorskip("transformers", reason="compares with PEFT")
    pytest.importorskip("peft", reason="compares with PEFT")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**DIMS, head_dim=8, tie_word_embeddings=True)
    made = transformers.Qwen3ForCausalLM(config).eval()
    made.save_pretrained(folder)
    return made


def train(folder: Path, **settings: Any) -> Any:
    """A tied model with an adapter that seems to be trained; both are saved."""
    made = make_tied(folder / "base")
    import peft
    import torch

    trained = peft.get_peft_model(made, peft.LoraConfig(r=4, **settings)).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    trained.save_pretrained(str(folder / "adapter"))
    return trained


def logits(each: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return each(input_ids=torch.arange(10)[None]).logits.numpy()  # type: ignore[no-any-return]


def loaded(folder: Path) -> Any:
    import transformers

    kind: Any = transformers.Qwen3ForCausalLM
    made, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return made.eval()


CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "the embedding whole": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "both whole": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "both whole and tied": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True,
    ),
    "LoRA on the embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "LoRA on the head": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "LoRA on both, tied": ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
    "trained rows": ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}, True),
    "neither": ({"target_modules": ["q_proj"]}, True),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_output_computes_what_was_trained(tmp_path: Path, case: str) -> None:
    settings, stays = CASES[case]
    trained = train(tmp_path, **settings)
    modelfuse.merge(
        lora_model_path=tmp_path / "adapter", base_model_path=tmp_path / "base", output_path=tmp_path / "out"
    )
    assert modelfuse.verify(tmp_path / "out", full=True).holds
    np.testing.assert_allclose(logits(loaded(tmp_path / "out")), logits(trained), rtol=0, atol=2e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is stays
    assert (H in read_model(tmp_path / "out")) is not stays


def test_an_adapter_that_unties_beside_a_tied_model(tmp_path: Path) -> None:
    train(tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    models = [tmp_path / "adapter", tmp_path / "base"]
    modelfuse.merge(model_path_list=models, base_model_path=tmp_path / "base", output_path=tmp_path / "out")
    got, base = read_model(tmp_path / "out"), read_model(tmp_path / "base")
    assert array(got[H]).tobytes() == array(base[E]).tobytes()
    assert not np.array_equal(array(got[E]), array(base[E]))


def test_an_adapter_saved_from_tied_models_covers_both_ends(tmp_path: Path) -> None:
    import peft
    import torch

    made = make_tied(tmp_path / "base")
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        made.save_pretrained(tmp_path / f"{seed}")
    settings: dict[str, Any] = {"model_path_list": [tmp_path / "1", tmp_path / "2"],
                                "base_model_path": tmp_path / "base", "merge_method": "dare_linear"}  # fmt: skip
    modelfuse.merge(**settings, output_path=tmp_path / "full")
    modelfuse.merge(**settings, output_path=tmp_path / "lora", output_format="lora", lora_rank=48)
    adapted = peft.PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "lora").eval()
    np.testing.assert_allclose(logits(adapted), logits(loaded(tmp_path / "full")), rtol=0, atol=1e-5)


def test_a_head_trained_on_a_model_without_one_is_refused_by_name(tmp_path: Path, refuse: Callable[..., str]) -> None:
    base = make_model(tmp_path / "base", {"encoder.layer.weight": EMBED}, config={"model_type": "vit"})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    from conftest import save_file

    save_file(adapter / "adapter_model.safetensors", {"base_model.model.lm_head.weight": HEAD})
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    refuse("merge", "--lora_model_path", adapter, "--base_model_path", base, "--output_path", tmp_path / "out",
           says=["lm_head.weight"])  # fmt: skip
