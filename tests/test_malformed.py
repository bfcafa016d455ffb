"""Broken input files of every kind: named, explained, refused before anything is written."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Said, array, make_model, random_tensors, read_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelfuse.checkpoints import open_checkpoint
from modelfuse.checkpoints.formats.safetensors import MAX_HEADER_BYTES, read_safetensors
from modelfuse.errors import CheckpointError

Refuse = Callable[..., str]
Run = Callable[..., Said]
Pair = tuple[Path, Path]


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_of(header: object, data: bytes = bytes(8), length: int | None = None) -> bytes:
    """A file with any header, well-formed or not."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


GOOD = file_of({"x": entry()})
DEEP = '{"x":' * 50_000 + "1" + "}" * 50_000
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "seven bytes": (bytes(7), "7 bytes"),
    "no header": (bytes(8), "start with '{'"),
    "zeros": (bytes(100), "start with '{'"),
    "header cut": (GOOD[:20], "truncated"),
    "data cut": (GOOD[:-1], "truncated download"),
    "data gone": (GOOD[:-8], "truncated download"),
    "a byte too many": (GOOD + b"\0", "the file has"),
    "header longer than the file": (file_of({"x": entry()}, length=10_000), "truncated"),
    "header of 100 MB": (file_of({"x": entry()}, length=MAX_HEADER_BYTES + 1), "allowed"),
    "header of 2^63": (file_of({"x": entry()}, length=2**63), "allowed"),
    "header of 2^64 - 1": (file_of({"x": entry()}, length=2**64 - 1), "allowed"),
    "header of no bytes": (file_of("", length=0), "start with '{'"),
    "not JSON": (file_of("{x}"), "not valid JSON"),
    "JSON cut": (file_of('{"x": {"dtype": "F32"'), "not valid JSON"),
    "JSON and more": (file_of('{"x": 1} {}'), "not valid JSON"),
    "a list": (file_of("[1]"), "start with '{'"),
    "a space first": (file_of(b" " + json.dumps({"x": entry()}).encode()), "start with '{'"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not valid JSON"),
    "UTF-16": (file_of(json.dumps({"x": entry()}).encode("utf-16-le")), "not valid JSON"),
    "UTF-8 with a mark": (file_of(b"\xef\xbb\xbf" + json.dumps({"x": entry()}).encode()), "start with '{'"),
    "half a character": (file_of('{"\\ud800": ' + json.dumps(entry()) + "}"), "no valid text"),
    "half a character in metadata": (file_of({"__metadata__": {"a": "\ud800"}, "x": entry()}), "no valid text"),
    "deep": (file_of(DEEP), "not valid JSON"),
    "deep lists": (file_of('{"x":' + "[" * 100_000), "not valid JSON"),
    "a number of 5000 digits": (file_of('{"x": ' + "9" * 5000 + "}"), "not valid JSON"),
    "a name twice": (file_of(f'{{"x": {json.dumps(entry())}, "x": {json.dumps(entry())}}}'), "'x' occurs twice"),
    "a key twice": (file_of('{"x": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}'), "twice"),
    "metadata twice": (file_of('{"__metadata__": {"a": "b", "a": "c"}, "x": ' + json.dumps(entry()) + "}"), "twice"),
    "metadata not a map": (file_of({"__metadata__": "pt", "x": entry()}), "__metadata__"),
    "metadata of numbers": (file_of({"__metadata__": {"format": 1}, "x": entry()}), "__metadata__"),
    "metadata nested": (file_of({"__metadata__": {"format": {}}, "x": entry()}), "__metadata__"),
    "entry a number": (file_of({"x": 1}), "'x' needs exactly"),
    "entry a list": (file_of({"x": [1]}), "'x' needs exactly"),
    "entry null": (file_of({"x": None}), "'x' needs exactly"),
    "no dtype": (file_of({"x": {"shape": [2], "data_offsets": [0, 8]}}), "'x' needs exactly"),
    "no shape": (file_of({"x": {"dtype": "F32", "data_offsets": [0, 8]}}), "'x' needs exactly"),
    "no offsets": (file_of({"x": {"dtype": "F32", "shape": [2]}}), "'x' needs exactly"),
    "unknown dtype": (file_of({"x": entry("F31")}), "unknown dtype 'F31'"),
    "dtype in small letters": (file_of({"x": entry("f32")}), "unknown dtype 'f32'"),
    "dtype a number": (file_of({"x": entry(32)}), "unknown dtype 32"),
    "dtype a list": (file_of({"x": entry(["F32"])}), "unknown dtype"),
    "dtype null": (file_of({"x": entry(None)}), "unknown dtype"),
    "shape a number": (file_of({"x": entry(shape=2)}), "shape 2"),
    "shape a string": (file_of({"x": entry(shape="2")}), "shape '2'"),
    "shape negative": (file_of({"x": entry(shape=[-2])}), "shape [-2]"),
    "shape twice negative": (file_of({"x": entry(shape=[-1, -2])}), "shape [-1, -2]"),
    "shape a float": (file_of({"x": entry(shape=[2.0])}), "shape [2.0]"),
    "shape true": (file_of({"x": entry(shape=[True, 2])}), "shape [True, 2]"),
    "shape NaN": (file_of('{"x": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}'), "shape [nan]"),
    "shape of 2^64": (file_of({"x": entry(shape=[2**64])}), "impossible shape"),
    "shape of 2^62 twice": (file_of({"x": entry(shape=[2**62, 2**62])}), "cannot fill 8 bytes"),
    "shape that overflows to two": (file_of({"x": entry(shape=[2**63 - 1, 2**63 - 1, 2**3])}), "cannot fill 8 bytes"),
    "shape of 100 dimensions": (file_of({"x": entry(shape=[1] * 99 + [2])}), "impossible shape"),
    "shape too small": (file_of({"x": entry(shape=[1])}), "cannot fill 8 bytes"),
    "shape too large": (file_of({"x": entry(shape=[3])}), "cannot fill 8 bytes"),
    "shape of nothing": (file_of({"x": entry(shape=[2, 0])}), "cannot fill 8 bytes"),
    "shape of half bytes": (file_of({"x": entry("F4", [3], [0, 1])}, bytes(1)), "cannot fill 1 bytes"),
    "offsets a number": (file_of({"x": entry(offsets=8)}), "data_offsets 8"),
    "one offset": (file_of({"x": entry(offsets=[8])}), "data_offsets [8]"),
    "three offsets": (file_of({"x": entry(offsets=[0, 4, 8])}), "data_offsets [0, 4, 8]"),
    "offsets reversed": (file_of({"x": entry(offsets=[8, 0])}), "data_offsets [8, 0]"),
    "offsets negative": (file_of({"x": entry(offsets=[-8, 0])}), "data_offsets [-8, 0]"),
    "offsets float": (file_of({"x": entry(offsets=[0.0, 8.0])}), "data_offsets"),
    "offsets of 2^64": (file_of({"x": entry(offsets=[2**64, 2**64 + 8])}), "data_offsets"),
    "offsets beyond the end": (file_of({"x": entry(offsets=[8, 16])}), "'x' starts at byte 8, expected 0"),
    "a gap": (file_of({"x": entry(), "y": entry(offsets=[12, 20])}, bytes(20)), "'y' starts at byte 12, expected 8"),
    "an overlap": (file_of({"x": entry(), "y": entry(offsets=[4, 12])}, bytes(12)), "'y' starts at byte 4, expected 8"),
    "the same bytes twice": (file_of({"x": entry(), "y": entry()}), "'y' starts at byte 0, expected 8"),
    "one inside the other": (file_of({"x": entry(), "y": entry(shape=[1], offsets=[2, 6])}), "expected 8"),
    "no tensors": (file_of({}, b""), "holds no tensors"),
    "only metadata": (file_of({"__metadata__": {"format": "pt"}}, b""), "holds no tensors"),
    "a zip": (b"PK\3\4" + bytes(100), "header claims"),
    "a page": (b"<!DOCTYPE html><html><body>Not found</body></html>" * 10, "allowed"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_safetensors(refuse: Refuse, tmp_path: Path, kind: str) -> None:
    content, says = MALFORMED[kind]
    good = make_model(tmp_path / "A", {"x": np.ones(2, np.float32)})
    bad = make_model(tmp_path / "B", {"x": np.ones(2, np.float32)})
    path = bad / "model.safetensors"
    path.write_bytes(content)
    hint = {"holds no tensors": "", "no valid text": "", "Git LFS": "git lfs pull"}.get(says, "again")
    for models in ([good, bad], [bad, good]):
        said = refuse("merge", "--model_path_list", *models, "--output_path", tmp_path / "C", says=[bad, says],
                      hint=hint or None)  # fmt: skip
        assert len(said) < 1000


def test_what_is_allowed(merge: Run, tmp_path: Path) -> None:
    """Order of names, spaces behind the header, empty tensors anywhere, scalars, no metadata."""
    header = {
        "b": entry(shape=[2, 1], offsets=[8, 16]),
        "empty": entry(shape=[0, 2**40], offsets=[8, 8]),
        "a": entry(),
        "first": entry("I64", [0], [0, 0]),
        "scalar": entry(shape=[], offsets=[16, 20]),
    }
    data = np.array([1, 2, 3, 4, 5], np.float32).tobytes()
    for name in "AB":
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(file_of(json.dumps(header) + "  \n\t ", data))
    merge("--model_path_list", tmp_path / "A", tmp_path / "B", "--output_path", tmp_path / "C")
    merged = read_model(tmp_path / "C")
    assert {name: (each.dtype, each.shape, array(each).ravel().tolist()) for name, each in merged.items()} == {
        "a": ("F32", (2,), [1, 2]), "b": ("F32", (2, 1), [3, 4]), "scalar": ("F32", (), [5]),
        "empty": ("F32", (0, 2**40), []), "first": ("I64", (0,), []),
    }  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_an_error_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes of a header changed at random: read as it says, or refused, and nothing else."""
    good = file_of({"__metadata__": {"format": "pt"}, "x": entry(), "y": entry("BF16", [2, 2], [8, 16])}, bytes(16))
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(good) - 17))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.safetensors"
    path.write_bytes(content[: data.draw(st.sampled_from([len(good), len(good) - 1, 40, 9, 8]))])
    with contextlib.suppress(CheckpointError):
        tensors, _ = read_safetensors(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(good)


def test_our_reader_agrees_with_the_reference_one(tmp_path: Path) -> None:
    """What the reference refuses, we refuse."""
    library = pytest.importorskip("safetensors", reason="needs safetensors, the reference reader")
    accepted = []
    for kind, (content, _) in MALFORMED.items():
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        try:
            with library.safe_open(path, "np"):
                accepted.append(kind)
        except Exception:
            continue
    stricter = {
        "a key twice",
        "a name twice",
        "a space first",
        "metadata twice",
        "half a character",
        "half a character in metadata",
        "shape of 100 dimensions",
        "no tensors",
        "only metadata",
    }
    assert set(accepted) <= stricter


# Files that are not files


def test_a_folder_instead_of_the_file(refuse: Refuse, pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "D" / "model.safetensors").mkdir(parents=True)
    refuse("check", "--model_path_list", pair[0], tmp_path / "D", says=[tmp_path / "D", "model.safetensors"])


def test_a_link_to_nothing(refuse: Refuse, pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "D").mkdir()
    (tmp_path / "D" / "model.safetensors").symlink_to(tmp_path / "gone")
    refuse("check", "--model_path_list", pair[0], tmp_path / "D", says=[tmp_path / "D", "holds no checkpoint"])


def test_a_pipe_instead_of_the_file(refuse: Refuse, pair: Pair, tmp_path: Path) -> None:
    """Opening a pipe for reading would wait for ever."""
    (tmp_path / "D").mkdir()
    os.mkfifo(tmp_path / "D" / "model.safetensors")
    said = refuse_without_reading(refuse, pair[0], tmp_path / "D")
    assert str(tmp_path / "D") in said


def refuse_without_reading(refuse: Refuse, *models: Path) -> str:
    return refuse("check", "--model_path_list", *models)


def test_files_behind_links_are_read(merge: Run, pair: Pair, tmp_path: Path) -> None:
    """As the cache of the Hugging Face hub lies on the disk."""
    for folder in pair:
        blobs = folder / "blobs"
        blobs.mkdir()
        (folder / "model.safetensors").rename(blobs / "0123")
        (folder / "model.safetensors").symlink_to("blobs/0123")
    merge("--model_path_list", *pair, "--output_path", tmp_path / "C")
    assert not (tmp_path / "C" / "model.safetensors").is_symlink()
    assert set(read_model(tmp_path / "C")) == set(random_tensors(1))


# Shards and their index


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_model(tmp_path / "S", random_tensors(2), shards=3)


def index_of(folder: Path) -> tuple[Path, dict[str, dict[str, str]]]:
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


SHARD = "model-00002-of-00003.safetensors"


def test_a_shard_that_is_missing(refuse: Refuse, pair: Pair, sharded: Path) -> None:
    (sharded / SHARD).unlink()
    refuse("check", "--model_path_list", pair[0], sharded, says=[sharded / SHARD, "missing"], hint="Fetch")
    (sharded / "model.safetensors.index.json").unlink()
    refuse("check", "--model_path_list", pair[0], sharded, says=[sharded, "2 of 3 shards"], hint="Fetch")


def test_shards_of_two_models(refuse: Refuse, pair: Pair, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    (sharded / "model-00001-of-00002.safetensors").write_bytes((sharded / SHARD).read_bytes())
    refuse("check", "--model_path_list", pair[0], sharded, says=[sharded, "shards"], hint="Fetch")


def test_a_whole_model_beside_an_index_of_other_files(refuse: Refuse, pair: Pair, sharded: Path) -> None:
    """One of the two is out of date, and which one is a guess."""
    (sharded / "model.safetensors").write_bytes((pair[0] / "model.safetensors").read_bytes())
    refuse(
        "check", "--model_path_list", pair[0], sharded, says=[sharded, "two models", "model.safetensors"], hint="Remove"
    )


@pytest.mark.parametrize(
    "name",
    [
        "../A/model.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "sub/model.safetensors",
        "..\\x",
        "./" + SHARD,
        "a\0b",
        7,
        None,
        ["x"],
    ],
)
def test_an_index_that_names_what_is_not_beside_it(refuse: Refuse, pair: Pair, sharded: Path, name: object) -> None:
    path, index = index_of(sharded)
    index["weight_map"]["model.norm.weight"] = name  # type: ignore[assignment]
    path.write_text(json.dumps(index))
    refuse("check", "--model_path_list", pair[0], sharded, says=[path, "not in its folder"], hint="Do not trust")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": "x"}', "no weight_map"),
        (b"\xff\xff", "not valid JSON"),
    ],
)
def test_an_index_that_is_malformed(refuse: Refuse, pair: Pair, sharded: Path, content: str | bytes, says: str) -> None:
    path, _ = index_of(sharded)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse("check", "--model_path_list", pair[0], sharded, says=[path, says])


def test_an_index_and_shards_that_disagree(refuse: Refuse, pair: Pair, sharded: Path) -> None:
    path, index = index_of(sharded)
    words = ["check", "--model_path_list", pair[0], sharded]
    good = dict(index["weight_map"])
    path.write_text(json.dumps({"weight_map": {**good, "ghost": SHARD}}))
    refuse(*words, says=[sharded, "'ghost'", SHARD, "does not hold it"], hint="again")
    moved = next(name for name, file in good.items() if file != SHARD)
    path.write_text(json.dumps({"weight_map": {**good, moved: SHARD}}))
    refuse(*words, says=[sharded, repr(moved), SHARD, "does not hold it"], hint="again")
    norm = "model.norm.weight"
    path.write_text(json.dumps({"weight_map": {name: file for name, file in good.items() if name != norm}}))
    refuse(*words, says=[sharded, "1 tensors", repr(norm)], hint="again")


def test_a_tensor_in_two_shards(refuse: Refuse, pair: Pair, sharded: Path) -> None:
    (sharded / "model-00003-of-00003.safetensors").write_bytes((sharded / SHARD).read_bytes())
    says = [sharded, "is in model-00002-of-00003.safetensors and in model-00003-of-00003.safetensors"]
    refuse("check", "--model_path_list", pair[0], sharded, says=says)
    (sharded / "model.safetensors.index.json").unlink()
    refuse("check", "--model_path_list", pair[0], sharded, says=says)


def test_a_shard_that_is_malformed(refuse: Refuse, pair: Pair, sharded: Path) -> None:
    os.truncate(sharded / SHARD, (sharded / SHARD).stat().st_size - 1)
    refuse("check", "--model_path_list", pair[0], sharded, says=[sharded / SHARD, "truncated"], hint="again")


# config.json


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "not valid JSON"), ("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ("[1]", "JSON object"),
     ("null", "JSON object"), (b"\xff", "not valid JSON"), ('{"a": ' + "9" * 5000 + "}", "not valid JSON")],
    ids=["empty", "cut", "deep", "list", "null", "bytes", "digits"],
)  # fmt: skip
def test_config_that_is_malformed(refuse: Refuse, pair: Pair, tmp_path: Path, content: str | bytes, says: str) -> None:
    path = pair[1] / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse("merge", "--model_path_list", *pair, "--output_path", tmp_path / "C", says=[path, says])


@pytest.mark.parametrize(
    "config",
    [{}, {"tie_word_embeddings": "yes"}, {"tie_word_embeddings": None}, {"quantization_config": None}, {"dtype": 5},
     {"torch_dtype": ["bfloat16"]}, {"architectures": {}}, {"quantization_config": {}}],
)  # fmt: skip
def test_config_that_is_strange_does_no_harm(merge: Run, tmp_path: Path, config: dict[str, object]) -> None:
    models = [make_model(tmp_path / name, random_tensors(1), config=config) for name in "AB"]
    merge("--model_path_list", *models, "--output_path", tmp_path / "C")
    assert len(read_model(tmp_path / "C")) == 5


def test_malformed_headers_take_no_memory(tmp_path: Path) -> None:
    """A sparse file whose header claims to be a gigabyte long is refused before any of it is read."""
    path = make_model(tmp_path / "A", {"x": np.ones(1, np.float32)}) / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**31)
    with pytest.raises(CheckpointError, match="allowed"):
        open_checkpoint(tmp_path / "A")
