"""Models whose tokenizer is sentencepiece's, or a slow one's vocabulary: read by transformers, through an extra."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Said, array, make_model, read_model

import modelfuse as package

sentencepiece = pytest.importorskip("sentencepiece")
transformers = pytest.importorskip("transformers")

Run = Callable[..., Said]
EMBEDDING, WIDTH = "model.embed_tokens.weight", 4


def make(folder: Path, words: list[str], seed: int) -> np.ndarray:
    """A model whose vocabulary sentencepiece has made of some words; its embedding."""
    text = folder.with_suffix(".txt")
    draw = random.Random(seed)
    text.write_text("\n".join(" ".join(draw.choices(words, k=6)) for _ in range(60)))
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=40, model_type="bpe", num_threads=1,
        hard_vocab_limit=False, minloglevel=2, unk_id=0, bos_id=1, eos_id=2,
    )  # fmt: skip
    rows = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
    embedding = np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype(np.float32)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": rows, "hidden_size": WIDTH,
              "num_attention_heads": 2,
              "tie_word_embeddings": True}  # fmt: skip
    content = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = {file.name: file.read_bytes() for file in folder.iterdir()}
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    make_model(folder, {EMBEDDING: embedding}, config=config,
               files={"tokenizer_config.json": json.dumps(content)})  # fmt: skip
    (folder / "tokenizer.model").write_bytes(made["tokenizer.model"])
    return embedding


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    monkeypatch.chdir(tmp_path)
    return {"a": make(tmp_path / "a", ["alpha", "beta", "gamma"], 1), "b": make(tmp_path / "b", ["delta", "zeta"], 2)}


UNION = "merge_method: linear\nbase_model: a\ntokenizer: {source: union}\nmodels:\n" + "".join(
    f"  - {{model: {name}, parameters: {{weight: 1}}}}\n" for name in "ab"
)


@pytest.mark.parametrize("grammar", ["configuration", "settings"])
def test_a_union_of_sentencepiece_models(two: dict[str, np.ndarray], merge: Run, tmp_path: Path, grammar: str) -> None:
    (tmp_path / "config.yml").write_text(UNION)
    words: list[Any] = ["--model_path_list", "a", "b", "--tokenizer", "union", "--allow_mismatch"]
    merge(*(words if grammar == "settings" else ["config.yml"]), "--output_path", "out")
    found = array(read_model(tmp_path / "out")[EMBEDDING])
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    for name, embedding in two.items():
        own = sentencepiece.SentencePieceProcessor(model_file=f"{name}/tokenizer.model")
        other = {"a": "b", "b": "a"}[name]
        theirs = sentencepiece.SentencePieceProcessor(model_file=f"{other}/tokenizer.model")
        pieces = {theirs.id_to_piece(number): number for number in range(theirs.vocab_size())}
        for number in range(own.vocab_size()):
            piece = own.id_to_piece(number)
            mean = (embedding[number] + two[other][pieces[piece]]) / 2 if piece in pieces else embedding[number]
            np.testing.assert_allclose(found[tokenizer.convert_tokens_to_ids(piece)], mean, rtol=1e-5, atol=1e-6)
    assert package.verify(tmp_path / "out", full=True).holds


def test_without_the_libraries_the_extra_is_named(
    two: dict[str, np.ndarray], refuse: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yml").write_text(UNION)
    monkeypatch.setattr("modelfuse.checkpoints.vocabulary.converted.find_spec", lambda name: None)
    refuse("merge", "config.yml", "--output_path", tmp_path / "out", says=["needs transformers and sentencepiece"],
           hint="[sentencepiece]")  # fmt: skip


def test_what_is_no_tokenizer_is_refused(
    two: dict[str, np.ndarray], refuse: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "config.yml").write_text(UNION)
    (tmp_path / "b" / "tokenizer.model").write_bytes(b"\x0a\xff\xff")
    refuse("merge", "config.yml", "--output_path", tmp_path / "out", says=["transformers cannot read tokenizer.model"])
