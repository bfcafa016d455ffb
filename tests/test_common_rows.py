"""Embeddings whose numbers of rows differ: ``diff`` compares the rows of the tokens that all models have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CONFIG, make_model
from test_vocabulary import tokenizer

import modelfuse
from modelfuse.inspection.diff_result import Diff

NAME, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = [f"t{number}" for number in range(12)]


def model(folder: Path, tokens: list[str], rows: int = 0, seed: int = 0, has_tokenizer: bool = True) -> dict[str, Any]:
    """A model with an embedding, a head and something else; rows follow from tokens, and padding from nothing."""
    draw = np.random.default_rng(seed)
    own = {token: np.random.default_rng(ord(token[0]) * 1000 + int(token[1:])).standard_normal(8) for token in tokens}
    padding = [draw.standard_normal(8) for _ in range(rows - len(tokens))]
    embedding = (np.stack([*own.values(), *padding]) + 0.1 * seed).astype(np.float32)
    tensors = {NAME: embedding, HEAD: 2 * embedding, "model.norm.weight": np.ones(8, np.float32) + seed}
    make_model(folder, tensors, config=CONFIG | {"vocab_size": len(embedding), "tie_word_embeddings": False})
    if has_tokenizer:
        tokenizer(folder, tokens)
    return tensors


def compared(tmp_path: Path) -> Diff:
    return modelfuse.diff(tmp_path / "a", tmp_path / "b", base=tmp_path / "base", progress=False)


def test_rows_are_compared_by_token(tmp_path: Path) -> None:
    """Whether they are at the same position or not; padding and added tokens are not."""
    base = model(tmp_path / "base", TOKENS, rows=16)
    model(tmp_path / "a", [*TOKENS, "x0", "x1"], seed=1)
    model(tmp_path / "b", ["x0", *TOKENS[::-1][1:]], seed=2)
    found = compared(tmp_path)
    assert not found.not_compared
    facts = {each.name: each for each in found.facts}
    assert (facts[NAME].shape, facts[NAME].rows, facts["model.norm.weight"].rows) == ((16, 8), 11, None)
    common = base[NAME][:11].astype(np.float64)
    for group, factor in ((next(each for each in found.tensors if each.name == name), factor)
                          for name, factor in ((NAME, 1), (HEAD, 2))):  # fmt: skip
        assert group.elements == 11 * 8
        assert group.base_norm == pytest.approx(factor * np.linalg.norm(common), rel=1e-6)
        assert [each.norm for each in group.models] == pytest.approx(
            [factor * size * np.sqrt(88) for size in (0.1, 0.2)], rel=1e-5
        )
        assert group.pair(0, 1).cosine == pytest.approx(1, abs=1e-6)
    assert (
        "Of model.embed_tokens.weight, 11 rows were compared, those of tokens that all models have; the base has 16."
        in found.findings
    )


def test_a_model_without_a_tokenizer_has_the_tokens_of_a_base_of_as_many_rows(tmp_path: Path) -> None:
    model(tmp_path / "base", TOKENS)
    model(tmp_path / "a", [*TOKENS, "x0"], seed=1)
    model(tmp_path / "b", TOKENS, seed=2, has_tokenizer=False)
    assert {each.rows for each in compared(tmp_path).facts if each.name == NAME} == {12}


@pytest.mark.parametrize(
    ("tokens", "has_tokenizer", "reason"),
    [([*TOKENS, "x0"], False, "a has no tokenizer.json, so its vocabulary is not known"),
     ([f"y{number}" for number in range(14)], True, "the models have no token in common")],
)  # fmt: skip
def test_why_rows_are_not_compared_is_told(tmp_path: Path, tokens: list[str], has_tokenizer: bool, reason: str) -> None:
    model(tmp_path / "base", TOKENS)
    model(tmp_path / "a", tokens, seed=1, has_tokenizer=has_tokenizer)
    model(tmp_path / "b", TOKENS, seed=2)
    found = compared(tmp_path)
    told = {each.tensor: each.because for each in found.not_compared}
    assert {*told} == {NAME, HEAD}
    assert told[NAME].startswith("other shapes: ")
    assert told[NAME].endswith(reason)
    assert [each.name for each in found.facts] == ["model.norm.weight"]
