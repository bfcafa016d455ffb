"""Models of several vocabularies by ``--tokenizer``: rows of embeddings and heads rearranged token by token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapting import factors, make_peft
from conftest import Said, array, make_model, read_model
from test_vocabulary import tokenizer_json

import modelfuse as package

Run = Callable[..., Said]
WIDTH, PADDING = 4, 2
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = {"A": ["<s>", "x", "y", "z"], "B": ["z", "<s>", "w", "x", "v"]}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Models A and B of two vocabularies, each with two rows of padding."""
    made = {}
    for seed, (name, words) in enumerate(WORDS.items()):
        draw = np.random.default_rng(seed)
        shapes = {
            EMBEDDING: (len(words) + PADDING, WIDTH),
            HEAD: (len(words) + PADDING, WIDTH),
            "norm.weight": (WIDTH,),
        }
        made[name] = {key: draw.standard_normal(shape).astype("f4") for key, shape in shapes.items()}
        config = {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": len(words) + PADDING,
                  "bos_token_id": words.index("<s>")}  # fmt: skip
        files = {"tokenizer.json": json.dumps(tokenizer_json(words)), "tokenizer_config.json": "{}"}
        make_model(tmp_path / name, made[name], config=config, files=files)
    return made


def merged(merge: Run, tmp_path: Path, *words: object) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The output's tensors and its config.json."""
    merge(*words, "--output_path", tmp_path / "C", "--overwrite")
    assert package.verify(tmp_path / "C", full=True).holds
    config: dict[str, Any] = json.loads((tmp_path / "C" / "config.json").read_text())
    return {name: array(each) for name, each in read_model(tmp_path / "C").items()}, config


def test_a_union_keeps_padding(models: dict[str, dict[str, Any]], merge: Run, tmp_path: Path) -> None:
    found, config = merged(merge, tmp_path, "--model_path_list", tmp_path / "A", tmp_path / "B", "--tokenizer", "union")
    for name in (EMBEDDING, HEAD):
        a, b = models["A"][name], models["B"][name]
        # <s> x y z w v, in the six rows that there were.
        rows = [(a[0] + b[1]) / 2, (a[1] + b[3]) / 2, a[2], (a[3] + b[0]) / 2, b[2], b[4]]
        np.testing.assert_allclose(found[name], rows, rtol=1e-6)
    assert (config["vocab_size"], config["bos_token_id"]) == (6, 0)
    tokens = json.loads((tmp_path / "C" / "tokenizer.json").read_text())
    assert [each["content"] for each in tokens["added_tokens"]] == ["w", "v"]


def test_the_vocabulary_of_the_base(models: dict[str, dict[str, Any]], merge: Run, tmp_path: Path) -> None:
    words = ["--model_path_list", tmp_path / "B", "--base_model_path", tmp_path / "A", "--weight_list", 0.5]
    found, config = merged(merge, tmp_path, *words, "--tokenizer", "base")
    a, b = models["A"][EMBEDDING], models["B"][EMBEDDING]
    rows = [(a[0] + b[1]) / 2, (a[1] + b[3]) / 2, a[2], (a[3] + b[0]) / 2, a[4], (a[5] + b[5]) / 2]
    np.testing.assert_allclose(found[EMBEDDING], rows, rtol=1e-5, atol=1e-6)
    assert config["vocab_size"] == 6
    assert (tmp_path / "C" / "tokenizer.json").read_bytes() == (tmp_path / "A" / "tokenizer.json").read_bytes()


def test_the_vocabulary_of_another_model(models: dict[str, dict[str, Any]], merge: Run, tmp_path: Path) -> None:
    words = ["--model_path_list", tmp_path / "A", tmp_path / "B", "--tokenizer", tmp_path / "B"]
    found, config = merged(merge, tmp_path, *words)
    a, b = models["A"][EMBEDDING], models["B"][EMBEDDING]
    rows = [(a[3] + b[0]) / 2, (a[0] + b[1]) / 2, b[2], (a[1] + b[3]) / 2, b[4]]
    np.testing.assert_allclose(found[EMBEDDING][:5], rows, rtol=1e-6)
    assert (config["vocab_size"], config["bos_token_id"]) == (7, 1)
    assert (tmp_path / "C" / "tokenizer.json").read_bytes() == (tmp_path / "B" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokenizer", "C"], "which is none of the models"),
        (["--tokenizer", "union", "--tokenizer_from", "A"], "tokenizer is union, but tokenizer_from is"),
        (
            ["--tokenizer", "union", "--base_model_path", "A", "--output_format", "lora"],
            "an adapter has none of its own",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(
    models: dict[str, dict[str, Any]], refuse: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert message in str(refuse("merge", "--model_path_list", "A", "B", "--output_path", "out", *words))


def test_a_model_without_a_tokenizer_is_told(models: dict[str, dict[str, Any]], refuse: Run, tmp_path: Path) -> None:
    (tmp_path / "B" / "tokenizer.json").unlink()
    words = [
        "--model_path_list",
        tmp_path / "A",
        tmp_path / "B",
        "--tokenizer",
        "union",
        "--output_path",
        tmp_path / "C",
    ]
    assert "has no tokenizer.json" in str(refuse("merge", *words))


def test_transformers_loads_a_union(tmp_path: Path, merge: Run) -> None:
    """Equal numbers for equal tokens."""
    transformers = pytest.importorskip("transformers")
    for seed, words in enumerate((["<s>", "x", "y", "z"], ["z", "<s>", "w", "<|im|>", "v"])):
        draw = np.random.default_rng(seed)
        tensors = {EMBEDDING: draw.standard_normal((len(words), WIDTH)).astype("f4")}
        added = {"<|im|>": {"special": True}} if "<|im|>" in words else {}
        make_model(tmp_path / "AB"[seed], tensors, config={"model_type": "llama", "vocab_size": len(words)}, files={
            "tokenizer.json": json.dumps(tokenizer_json(words, added=added)),
            "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}),
        })  # fmt: skip
    merge("--model_path_list", tmp_path / "A", tmp_path / "B", "--tokenizer", "union", "--output_path", tmp_path / "C")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "C")
    assert loaded.get_vocab() == {"<s>": 0, "x": 1, "y": 2, "z": 3, "w": 4, "v": 5, "<|im|>": 6}
    assert loaded.tokenize("x <|im|> w") == ["x", "<|im|>", "w"]
    assert "<|im|>" in loaded.all_special_tokens or loaded.decode([6], skip_special_tokens=True) == ""


def test_an_adapters_rows_are_its_base_s(models: dict[str, dict[str, Any]], merge: Run, tmp_path: Path) -> None:
    words = len(WORDS["A"]) + PADDING
    a, b = factors(5, words, WIDTH)
    name = "model.embed_tokens"
    tensors = {
        f"{name}.lora_embedding_A": np.ascontiguousarray(b.T),
        f"{name}.lora_embedding_B": np.ascontiguousarray(a.T),
    }
    make_peft(tmp_path / "L", tensors)
    (tmp_path / "L" / "tokenizer.json").write_bytes((tmp_path / "A" / "tokenizer.json").read_bytes())
    found, _ = merged(merge, tmp_path, "--model_path_list", tmp_path / "L", tmp_path / "B", "--base_model_path",
                      tmp_path / "A", "--weight_list", 1, 0, "--tokenizer", "union")  # fmt: skip
    delta = 1.5 * (b @ a)
    base = models["A"][EMBEDDING]
    np.testing.assert_allclose(found[EMBEDDING][:4], base[:4] + delta[:4], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[EMBEDDING][4], models["B"][EMBEDDING][2], rtol=1e-6)
