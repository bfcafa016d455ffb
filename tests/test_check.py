"""``modelfuse check``: the whole plan, from headers alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Said, bf16, make_model, random_tensors, snapshot

import modelfuse as package
from modelfuse.checkpoints.formats.safetensors import frame_safetensors
from modelfuse.dtypes import BF16

Run = Callable[..., Said]
Pair = tuple[Path, Path]


@pytest.fixture
def check(modelfuse: Run, tmp_path: Path) -> Run:
    """``modelfuse check`` that finds no problem, and touches nothing."""

    def run(*words: object) -> Said:
        before = snapshot(tmp_path)
        said = modelfuse("check", *words)
        assert said.status == 0, said.err
        assert said.err == ""
        assert "no problems found" in said.out
        assert snapshot(tmp_path) == before
        return said

    return run


def line_with(text: str, word: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if word in line)
    return line.split()


def test_the_plan(check: Run, pair: Pair, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", random_tensors(3))
    said = check(
        "--model_path_list",
        *pair,
        "--base_model_path",
        base,
        "--merge_method",
        "della",
        "--weight_list",
        1,
        3,
        "--normalize",
        "--output_path",
        tmp_path / "C",
        "--n_process",
        1,
    )
    assert said.out.splitlines()[0] == "della (magprune → ties) of 2 models"
    assert line_with(said.out, f"{pair[0]} ") == [str(pair[0]), "safetensors", "5", "0.25"]
    assert line_with(said.out, f"{pair[1]} ") == [str(pair[1]), "safetensors", "5", "0.75"]
    assert line_with(said.out, f"{base} ") == [str(base), "safetensors", "5", "base"]
    assert line_with(said.out, "layers.*.mlp") == ["merge", "model.layers.*.mlp.weight", "float32", "[4,", "5]", "2"]
    assert line_with(said.out, "lm_head") == ["merge", "lm_head.weight", "float32", "[11,", "4]", "1"]
    assert "reads 1.58 kB, writes " in said.out
    assert "into 1 weight file, copies 1 other file; 1 worker, at most about" in said.out


def test_what_is_copied_and_left_out(check: Run, tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    tensors = {**random_tensors(1), "ids": np.arange(4), "model.rotary_emb.inv_freq": np.ones(2, np.float32)}
    models = [make_model(tmp_path / name, tensors, config=tied) for name in "AB"]
    said = check("--model_path_list", *models)
    assert line_with(said.out, "ids")[:2] == ["copy", "ids"]
    assert line_with(said.out, "inv_freq")[:2] == ["copy", "model.rotary_emb.inv_freq"]
    assert line_with(said.out, "lm_head")[:3] == ["leave", "out", "lm_head.weight"]
    assert "tied to model.embed_tokens.weight" in said.out


def test_workers_memory_and_shards(check: Run, pair: Pair) -> None:
    said = check("--model_path_list", *pair, "--n_process", 64, "--memory", "1kB", "--max_shard_size", 250)
    assert "into 3 weight files" in said.out
    assert "1 of 64 workers, to stay within the memory budget" in said.out
    assert "one worker needs that" in said.out


def test_long_paths_are_shown_whole(check: Run, tmp_path: Path) -> None:
    folder = tmp_path / ("long-name-" * 12) / ("and-deeper-" * 8)
    models = [make_model(folder / name, random_tensors(1)) for name in "AB"]
    said = check("--model_path_list", *models)
    assert all(str(path) in said.out for path in models)


def test_a_plan_in_python(pair: Pair, tmp_path: Path) -> None:
    plan = package.check(model_path_list=pair, weight_list=[1, 3], output_dtype="bfloat16", max_shard_size=300)
    assert isinstance(plan, package.Plan)
    assert [tensor.name for tensor in plan.tensors] == list(random_tensors(1))
    assert {tensor.dtype.name for tensor in plan.tensors} == {"BF16"}
    assert plan.bytes_read == 2 * 4 * sum(tensor.size for tensor in plan.tensors)
    result = package.merge(
        model_path_list=pair,
        weight_list=[1, 3],
        output_dtype="bfloat16",
        max_shard_size=300,
        output_path=tmp_path / "C",
    )
    files = {path.name: path.stat().st_size for path in (tmp_path / "C").glob("*.safetensors")}
    assert files == {file.name: file.size for file in plan.files}
    assert result.bytes_written == plan.bytes_written == sum(files.values())


def test_no_byte_of_a_tensor_is_read(modelfuse: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three models of 40 GB each that are nearly all holes."""
    shape, shards = (1 << 15, 1 << 13), 40
    for name in ("A", "B", "base"):
        (tmp_path / name).mkdir()
        for shard in range(shards):
            tensors = [(f"layers.{shard}.{part}.weight", BF16, shape) for part in ("up", "down")]
            header = frame_safetensors(tensors, {"format": "pt"}).pieces[0][1]
            path = tmp_path / name / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            with path.open("wb") as file:
                file.write(header)
                file.truncate(len(header) + 2 * BF16.nbytes(shape[0] * shape[1]))
    read = 0
    preadv = os.preadv

    def counting(*words: object) -> int:
        nonlocal read
        count: int = preadv(*words)  # type: ignore[arg-type]
        read += count
        return count

    monkeypatch.setattr(os, "preadv", counting)
    said = modelfuse(
        "check", "--model_path_list", tmp_path / "A", tmp_path / "B", "--base_model_path", tmp_path / "base"
    )
    assert said.status == 0, said.err
    assert "reads 129 GB, writes 42.9 GB into 9 weight files" in said.out
    assert line_with(said.out, "up.weight")[-1] == "40"
    assert read < 100_000


def test_mixed_types_are_shown(check: Run, tmp_path: Path) -> None:
    models = [make_model(tmp_path / "A", {"x": bf16(np.ones(3))}), make_model(tmp_path / "B", {"x": np.ones(3)})]
    assert line_with(check("--model_path_list", *models).out, "merge")[:3] == ["merge", "x", "bfloat16"]
    assert line_with(check("--model_path_list", *models, "--output_dtype", "fp32").out, "merge")[:3] == [
        "merge",
        "x",
        "float32",
    ]


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear", "ties"])
def test_what_drops_weights_without_a_base_warns_first(
    check: Run, modelfuse: Run, pair: Pair, tmp_path: Path, method: str
) -> None:
    words = ("--merge_method", method, "--model_path_list", *pair)
    warning = "without base_model_path drops parts of the models' weights themselves"
    first, *rest = check(*words).out.splitlines()
    assert first.startswith("warning: ")
    assert warning in first
    assert not [line for line in rest if warning in line]
    said = modelfuse("merge", *words, "--output_path", tmp_path / "C")
    assert said.status == 0
    assert said.err.startswith("warning: ")
    assert said.err.count(warning) == 1
    assert warning in json.loads((tmp_path / "C" / "merge_report.json").read_text())["warnings"][0]
    assert warning in package.check(merge_method=method, model_path_list=pair).notes[0]
    # Before anything is read.
    assert modelfuse("merge", *words[:-2], "/absent/a", "/absent/b", "--output_path", "D").err.startswith("warning: ")
    based = check(*words, "--base_model_path", pair[0])
    assert "warning" not in based.out
    quiet = modelfuse("merge", *words, "--output_path", tmp_path / "E", "--quiet")
    assert (quiet.out, quiet.err) == ("", "")
