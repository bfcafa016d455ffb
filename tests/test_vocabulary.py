"""Vocabularies of several models: the output's tokens, which rows each token has, and rows read from where they lie."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from modelfuse.checkpoints import StoredTensor, open_checkpoint
from modelfuse.checkpoints.vocabulary.rearranged_rows import rearranged
from modelfuse.checkpoints.vocabulary.row_maps import MEAN, ZEROS, RowMap, TokenRow, Vocabularies
from modelfuse.checkpoints.vocabulary.tokenizers import Tokenizer, read_tokenizer
from modelfuse.checkpoints.vocabulary.union import OutputVocabulary, one_of, union_of
from modelfuse.errors import CheckpointError

BASE = ["<s>", "</s>", "a", "b", "c"]


def tokenizer_json(
    tokens: list[str], kind: str = "WordLevel", added: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """A tokenizer whose tokens are numbered in order; those of ``added`` with their settings."""
    added = added or {}
    # An added token is one of the model's own too, or comes behind them: the library numbers them so.
    words = len(tokens) - len(added)
    vocab: Any = {token: number for number, token in enumerate(tokens) if token not in added or number < words}
    own = list(vocab)
    model: dict[str, Any] = {"type": kind, "vocab": vocab, "unk_token": own[0]}
    if kind == "Unigram":
        model = {"type": kind, "vocab": [[token, -1.0] for token in own], "unk_id": 0}
    if kind == "BPE":
        model = {"type": kind, "vocab": vocab, "merges": [[token[0], token[1:]] for token in own if len(token) == 2]}
    listed = [{"id": tokens.index(token), "content": token, "single_word": False, "lstrip": False, "rstrip": False,
               "normalized": False, "special": True} | settings for token, settings in added.items()]  # fmt: skip
    return {"version": "1.0", "added_tokens": listed, "pre_tokenizer": {"type": "Whitespace"}, "model": model}


def tokenizer(folder: Path, tokens: list[str], **more: Any) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokens, **more)))
    return read_tokenizer(folder)


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece", "BPE", "Unigram"])
def test_every_kind_of_vocabulary_is_read(tmp_path: Path, kind: str) -> None:
    read = tokenizer(tmp_path, ["a", "b", "ab", "<x>"], kind=kind, added={"<x>": {}})
    assert (read.kind, read.rows) == (kind, 4)
    assert dict(read.tokens) == {"a": 0, "b": 1, "ab": 2, "<x>": 3}
    assert read.added["<x>"]["special"] is True


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "has no model"),
        ({"model": {"vocab": 3}}, "has a vocabulary that is not understood"),
        ({"model": {"vocab": {"a": -1}}}, "the token 'a' has the number -1"),
        ({"model": {"vocab": {"a": 1 << 40}}}, "the token 'a' has the number"),
        ({"model": {"vocab": {"a": 1, "b": 1}}}, "the tokens 'a' and 'b' both have the number 1"),
        ({"model": {"vocab": {"a": 1}}, "added_tokens": [{"id": 2, "content": "a"}]}, "has the numbers 1 and 2"),
        ({"model": {"vocab": {"a": 1}}, "added_tokens": [{"content": "x"}]}, "an added token has no content or no id"),
    ],
)
def test_malformed_tokenizers_are_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer(tmp_path)


def test_a_model_with_other_files_is_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"has tokenizer\.model: convert it once"):
        read_tokenizer(tmp_path)


def union(tmp_path: Path, *models: list[str], limits: tuple[int | None, ...] = (), **more: Any) -> OutputVocabulary:
    read = [tokenizer(tmp_path / str(number), tokens) for number, tokens in enumerate(models)]
    return union_of(read, limits or (None,) * len(read), **more)


def test_a_union_appends_what_is_new_in_the_models_order(tmp_path: Path) -> None:
    first, second = ["<s>", "y", "a", "x"], ["z", "x", "<s>", "w"]
    found = union(tmp_path, BASE, first, second, extra=["<new>", "w"])
    assert list(found.tokens)[5:] == ["y", "x", "z", "w", "<new>"]
    assert list(found.tokens.values()) == list(range(10))
    assert [each["content"] for each in found.added] == ["y", "x", "z", "w", "<new>"]
    assert not any(each["special"] for each in found.added)


def test_special_tokens_keep_their_settings_and_come_after_words(tmp_path: Path) -> None:
    base = tokenizer(tmp_path / "base", BASE, added={"<s>": {}})
    other = tokenizer(
        tmp_path / "other", ["<s>", "<im>", "d"], added={"<im>": {"lstrip": True}, "<s>": {"lstrip": True}}
    )
    found = union_of([base, other], [None, None])
    assert list(found.tokens)[5:] == ["d", "<im>"]
    assert [(each["special"], each["lstrip"]) for each in found.added] == [(False, False), (True, True)]
    assert found.conflicts == ("<s>",)


def test_tokens_without_rows_count_as_absent(tmp_path: Path) -> None:
    found = union(tmp_path, BASE, ["<s>", "x", "y"], limits=(None, 2))
    assert "y" not in found.tokens
    limited = one_of(tokenizer(tmp_path / "bpe", ["a", "b", "ab", "ba"], kind="BPE"), limit=3)
    assert limited.removed == {"ba"}
    content = json.loads(limited.tokenizer_json())
    assert content["model"] == {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    assert not one_of(tokenizer(tmp_path / "words", BASE), limit=3).removed


def test_the_output_loads_in_the_tokenizers_library(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    base = tokenizer(tmp_path / "base", BASE, added={"<s>": {}})
    other = tokenizer(tmp_path / "other", ["<s>", "<im>", "d", "e f"], added={"<im>": {}})
    found = union_of([base, other], [None, None], ["<new>"])
    loaded = tokenizers.Tokenizer.from_str(found.tokenizer_json().decode())
    assert loaded.get_vocab() == dict(found.tokens)
    assert loaded.encode("a <im> b <new> d").tokens == ["a", "<im>", "b", "<new>", "d"]
    config = {"added_tokens_decoder": {"0": {"content": "<s>"}}, "model_max_length": 5}
    decoder = found.tokenizer_config(config)["added_tokens_decoder"]
    assert decoder["6"]["content"] == "e f"
    assert decoder["7"] == {"content": "<im>", "single_word": False, "lstrip": False, "rstrip": False,
                            "normalized": False, "special": True}  # fmt: skip
    assert found.tokenizer_config({"a": 1}) == {"a": 1}


def vocabularies(
    tmp_path: Path, *models: list[str], base: int | None = 0, wanted: Mapping[str, TokenRow] | None = None, **more: Any
) -> Vocabularies:
    read = [tokenizer(tmp_path / str(number), tokens) for number, tokens in enumerate(models)]
    limits = more.pop("limits", tuple(len(tokens) for tokens in models))
    output = union_of(read, limits, wanted or ())
    length = more.pop("length", output.rows)
    return Vocabularies(output.tokens, read, limits, base, wanted or {}, length, **more)


def rows_of(row_map: RowMap) -> list[object]:
    found: list[object] = []
    for row, (number, each) in enumerate(zip(row_map.inputs.tolist(), row_map.rows.tolist(), strict=True)):
        found.append({ZEROS: 0, MEAN: row_map.means.get(row)}.get(number, (number, each)))
    return found


def test_rows_come_from_whoever_has_the_token(tmp_path: Path) -> None:
    maps = vocabularies(tmp_path, ["a", "b"], ["b", "x", "y"], ["y", "a"]).row_maps([0, 1, 2])
    # a b x y: what the base has is its, what one has is its, what two have without the base is their mean.
    assert rows_of(maps[0]) == [(0, 0), (0, 1), (1, 1), ((1, 2), (2, 0))]
    assert rows_of(maps[1]) == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert rows_of(maps[2]) == [(2, 1), (0, 1), (1, 1), (2, 0)]


def test_without_a_base_what_several_have_is_a_mean(tmp_path: Path) -> None:
    maps = vocabularies(tmp_path, ["a", "b"], ["b", "a"], ["y"], base=None).row_maps([0, 1, 2])
    assert rows_of(maps[2]) == [((0, 0), (1, 1)), ((0, 1), (1, 0)), (2, 0)]


def test_only_models_that_are_merged_count(tmp_path: Path) -> None:
    found = vocabularies(tmp_path, ["a"], ["a", "x"], ["a", "y"])
    maps = found.row_maps([0, 1])
    assert rows_of(maps[0]) == [(0, 0), (1, 1), 0]
    assert found.missing([0, 1]) == ("y",)


def test_rows_that_are_asked_for(tmp_path: Path) -> None:
    wanted = {"b": TokenRow((1, 2), False), "a": TokenRow((1, 2), True), "<new>": TokenRow(None, False)}
    found = vocabularies(tmp_path, ["a", "b"], ["a", "x", "y"], wanted=wanted)
    maps = found.row_maps([0, 1])
    assert rows_of(maps[0]) == [(1, 2), (0, 1), (1, 1), (1, 2), 0]
    assert rows_of(maps[1]) == [(1, 2), (1, 2), (1, 1), (1, 2), 0]
    assert found.missing([0, 1]) == ()


def test_tokens_beyond_a_models_rows_are_not_its(tmp_path: Path) -> None:
    maps = vocabularies(tmp_path, ["a", "b", "c"], ["a", "b", "c"], limits=(3, 2)).row_maps([0, 1])
    assert rows_of(maps[1]) == [(1, 0), (1, 1), (0, 2)]


def test_rows_without_tokens_stay_where_they_are(tmp_path: Path) -> None:
    found = vocabularies(tmp_path, ["a", "b"], ["a", "x"], limits=(6, 4), length=6)
    maps = found.row_maps([0, 1])
    assert rows_of(maps[0]) == [(0, 0), (0, 1), (1, 1), (0, 3), (0, 4), (0, 5)]
    assert rows_of(maps[1]) == [(1, 0), (0, 1), (1, 1), (1, 3), (0, 4), (0, 5)]


def stored(tmp_path: Path, **tensors: Any) -> dict[str, StoredTensor]:
    save_file(tensors, tmp_path / "model.safetensors")
    return dict(open_checkpoint(tmp_path))


def read(tensor: StoredTensor, steps: int = 5) -> Any:
    """All elements, read in pieces of so many."""
    kind = np.dtype(tensor.dtype.numpy)
    out = np.empty(tensor.size, kind)
    with tensor.open() as reader:
        for begin in range(0, out.size, steps):
            reader(begin, out[begin : begin + steps].view(np.uint8).data)
    return out.reshape(tensor.shape)


def row_map(*rows: Any, padding: int = 0) -> RowMap:
    """A map from pairs, 0 for zeros, and lists of pairs for means."""
    inputs = [ZEROS if each == 0 else MEAN if isinstance(each, list) else each[0] for each in rows]
    places = [0 if each == 0 or isinstance(each, list) else each[1] for each in rows]
    means = {number: tuple(each) for number, each in enumerate(rows) if isinstance(each, list)}
    return RowMap(np.array(inputs), np.array(places), means, padding)


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 100])
@pytest.mark.parametrize("shape", [(6, 4), (6,)])
def test_rows_are_read_from_where_they_lie(tmp_path: Path, steps: int, shape: tuple[int, ...]) -> None:
    draw = np.random.default_rng(1)
    one, two = (draw.standard_normal(shape).astype("f4") for _ in range(2))
    tensors = stored(tmp_path, one=one, two=two)
    asked = row_map((0, 3), (0, 4), (1, 0), 0, 0, (0, 5), (0, 0), (1, 1), (1, 2))
    found = rearranged(0, {0: tensors["one"], 1: tensors["two"]}, asked)
    expected = np.stack([one[3], one[4], two[0], 0 * one[0], 0 * one[0], one[5], one[0], two[1], two[2]])
    np.testing.assert_array_equal(read(found, steps), expected)
    assert (found.shape, found.dtype.name, found.natural.name) == ((9, *shape[1:]), "F32", "F32")


@pytest.mark.parametrize("steps", [1, 5, 100])
def test_means_and_padding_are_computed_wider(tmp_path: Path, steps: int) -> None:
    one = np.arange(12, dtype="f2").reshape(4, 3) / 3
    two = np.arange(9, dtype="f4").reshape(3, 3) / 7
    tensors = stored(tmp_path, one=one, two=two)
    found = rearranged(0, {0: tensors["one"], 1: tensors["two"]}, row_map((0, 1), [(0, 0), (1, 2)], (1, 1), padding=2))
    mean = (one[0].astype("f8") + two[2].astype("f8")) / 2
    real = np.stack([one[1].astype("f4"), mean.astype("f4"), two[1]])
    padding = real.astype("f8").mean(axis=0).astype("f4")
    np.testing.assert_array_equal(read(found, steps), np.stack([*real, padding, padding]))
    assert (found.dtype.name, found.natural.name, found.stored.name) == ("F32", "F16", "F16")


def test_rows_of_a_transposed_head(tmp_path: Path) -> None:
    head = np.arange(12, dtype="f4").reshape(3, 4)
    found = rearranged(0, {0: stored(tmp_path, head=head)["head"]}, row_map((0, 3), (0, 0), 0), axis=1)
    np.testing.assert_array_equal(read(found), np.stack([head[:, 3], head[:, 0], 0 * head[:, 0]], axis=1))


def test_nothing_is_rearranged_that_stays_as_it_is(tmp_path: Path) -> None:
    tensor = stored(tmp_path, one=np.ones((3, 2), "f4"))["one"]
    assert rearranged(0, {0: tensor}, row_map((0, 0), (0, 1), (0, 2))) is tensor
    assert rearranged(0, {0: tensor}, row_map((0, 0), (0, 1))) is not tensor


def test_a_large_vocabulary_is_mapped_at_once(tmp_path: Path) -> None:
    """A quarter of a million tokens, most of them shared: no work a token in Python but the dictionaries' own."""
    import time

    first = [f"t{number}" for number in range(256_000)]
    second = [f"t{number}" for number in range(250_000, 500_000)]
    found = vocabularies(tmp_path, first, second)
    begin = time.perf_counter()
    maps = found.row_maps([0, 1])
    assert time.perf_counter() - begin < 5
    assert len(maps[0]) == 500_000
    assert maps[0].donors == (0, 1)
