"""Every mistake a user can make: status 2, a message that names what is wrong, a hint, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Said, Stored, array, bf16, call, make_model, random_tensors, read_model, snapshot

import modelfuse as package
from modelfuse.errors import OutputError

Refuse = Callable[..., str]
Run = Callable[..., Said]
Pair = tuple[Path, Path]


@pytest.fixture
def words(pair: Pair, tmp_path: Path) -> list[Any]:
    return ["merge", "--model_path_list", *pair, "--output_path", tmp_path / "C"]


# Settings


@pytest.mark.parametrize(
    ("flags", "says", "hint"),
    [
        (["--reserve_q", "0.5"], ["There is no setting 'reserve_q'"], "'reserve_p'"),
        (["--wieght-list", "1", "2"], ["There is no setting 'wieght-list'"], "'weight_list'"),
        (["--no_resale"], ["There is no setting 'no_resale'"], "rescale"),
        (["--zzzzzzzz", "1"], ["There is no setting 'zzzzzzzz'"], "--help"),
        (["-o", "x"], ["There is no flag -o"], "two dashes"),
        (["--"], ["There is no flag --"], "two dashes"),
        (["--weight_list", "1"], ["weight_list has 1 weights for 2 models"], "one weight a model"),
        (["--weight_list", "1", "1", "1"], ["weight_list has 3 weights for 2 models"], "one weight a model"),
        (["--weight_list", "1", "-1", "--normalize"], ["weight_list sums to zero"], "--no_normalize"),
        (["--weight_list", "1", "-2", "--normalize"], ["weight_list sums to -1"], "--no_normalize"),
        (["--weight_list", "1e308", "1e308", "--normalize"], ["weight_list"], None),
        (["--weight_list", "1e39", "1"], ["weight_list"], None),
        (["--weight_list", "nan", "1"], ["weight_list is 'nan'"], "--help"),
        (["--weight_list", "1", "inf"], ["weight_list is 'inf'"], "--help"),
        (["--weight_list", "1", "-inf"], ["-inf is not a number"], None),
        (["--weight_list", "1", "-1e999999999"], ["-1e999999999 is not a number"], None),
        (["--weight_list", "1,2x"], ["weight_list is '2x'"], "--help"),
        (["--weight_list"], ["weight_list"], "--help"),
        (["--slerp_alpha", "1.5"], ["slerp_alpha is '1.5'"], "--help"),
        (["--slerp_alpha", "-0.1"], ["slerp_alpha is '-0.1'"], "--help"),
        (["--slerp_alpha", "nan"], ["slerp_alpha is 'nan'"], "--help"),
        (["--slerp_dot_threshold", "2"], ["slerp_dot_threshold is '2'"], "--help"),
        (["--slerp_normalize_eps", "-1e-3"], ["slerp_normalize_eps is '-0.001'"], "--help"),
        (["--reserve_p", "0"], ["reserve_p is '0'"], "--help"),
        (["--reserve_p", "1.01"], ["reserve_p is '1.01'"], "--help"),
        (["--reserve_p", "nan"], ["reserve_p is 'nan'"], "--help"),
        (["--reserve_p", "half"], ["reserve_p is 'half'"], "--help"),
        (["--epsilon", "-1"], ["epsilon is '-1'"], "--help"),
        (["--merge_method", "della", "--reserve_p", "0.05"], ["magprune", "reserve_p"], "epsilon"),
        (["--merge_method", "della_linear", "--reserve_p", "0.95"], ["magprune", "reserve_p"], "epsilon"),
        (["--sparsify_type", "magprune", "--epsilon", "0.6"], ["magprune", "between 0 and 1"], "epsilon"),
        (["--merge_method", "linaer"], ["merge_method is 'linaer'", "'linear'"], "--help"),
        (["--merge_type", "mean"], ["merge_type is 'mean'", "'linear'"], "--help"),
        (["--sparsify_type", "prune"], ["sparsify_type is 'prune'", "'magprune'"], "--help"),
        (["--ties_elect_type", "max"], ["ties_elect_type is 'max'", "'count'"], "--help"),
        (["--merge_method", "ties", "--merge_type", "linear"], ["merge_method ties means merge_type ties"], "Leave"),
        (["--merge_method", "linear", "--sparsify_type", "dare"], ["sparsify_type none, but dare"], "Leave"),
        (["--merge_method", "slerp", "--weight_list", "1", "1"], ["slerp takes no weight_list"], "--slerp_alpha"),
        (["--seed", "-1"], ["seed is '-1'"], "--help"),
        (["--seed", "1.5"], ["seed is '1.5'"], "--help"),
        (["--seed", str(2**63)], ["seed is"], "--help"),
        (["--n_process", "0"], ["n_process is '0'"], "--help"),
        (["--n_process", "two"], ["n_process is 'two'"], "--help"),
        (["--memory", "0"], ["memory is"], "--help"),
        (["--memory", "1 parsec"], ["memory is '1 parsec'", "500MB"], "--help"),
        (["--memory", "9" * 400], ["memory is"], "--help"),
        (["--max_shard_size", "-5GB"], ["-5GB"], None),
        (["--max_tensor_mem", "0"], ["max_tensor_mem is '0'"], "--help"),
        (["--split_pieces", "0"], ["split_pieces is '0'"], "--help"),
        (["--rescale", "perhaps"], ["rescale is 'perhaps'"], "--help"),
        (["--device", "tpu"], ["device is 'tpu'", "'low_gpu_mem'"], "--help"),
        (["--tensor_type", "jax"], ["tensor_type is 'jax'"], "--help"),
        (["--device", "gpu"], ["device gpu"], "--device cpu"),
        (["--device", "low_gpu_mem"], ["device low_gpu_mem"], "--device cpu"),
        (["--gpu_memory", "63MB"], ["gpu_memory is '63MB'", "64000000"], "--help"),
        (["--merge_prefix", "optimizer"], ["merge_prefix is 'optimizer'", "'master_weights'"], "--help"),
        (["--output_dtype", "int8"], ["output_dtype is 'int8'", "'bfloat16'"], "--help"),
        (["--on_nonfinite", "ignore"], ["on_nonfinite is 'ignore'", "'propagate'"], "--help"),
        (["--copy_file_list", "/etc/passwd"], ["copy_file_list names '/etc/passwd'"], None),
        (["--copy_file_list", "../A/x"], ["copy_file_list names '../A/x'"], None),
        (["--copy_file_list", "vocab.txt"], ["copy_file_list names vocab.txt, which is not in"], None),
        (["--copy_file_list", "model.safetensors"], ["copy_file_list names", "model.safetensors"], None),
        (["--copy_file_list", "./model.safetensors"], ["copy_file_list names", "model.safetensors"], None),
        (["--model_path_str", "A,B"], ["model_path_str and model_path_list are both given"], "one of them"),
        (["--output_path"], ["output_path"], "--help"),
        (["--output_path", ""], ["output_path"], None),
        (["--base_model_path", ""], ["base_model_path"], None),
        (["--unmerged_from", "elsewhere"], ["unmerged_from is", "none of the models"], "one of the models' paths"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_setting(refuse: Refuse, words: list[Any], flags: list[str], says: list[str], hint: str | None) -> None:
    refuse(*words, *flags, says=says, hint=hint)


@pytest.mark.parametrize("command", ["merge", "check"])
def test_too_few_models(refuse: Refuse, pair: Pair, tmp_path: Path, command: str) -> None:
    out = ["--output_path", tmp_path / "C"]
    refuse(command, "--model_path_list", pair[0], *out, says=["model_path_list names 1 model"], hint="two or more")
    refuse(command, "--model_path_str", pair[0], *out, says=["model_path_list names 1 model"], hint="two or more")
    refuse(command, "--model_path_str", ",", *out, says=["model_path_list names 0 model"], hint="two or more")
    refuse(command, *out, says=["model_path_list is not given"], hint="--help")
    refuse(command, "--model_path_list", *out, says=["model_path_list"], hint="--help")


def test_slerp_with_three(refuse: Refuse, pair: Pair, tmp_path: Path) -> None:
    models = ["--model_path_list", *pair, pair[0], "--output_path", tmp_path / "C"]
    refuse("merge", *models, "--merge_method", "slerp", says=["exactly two", "3"], hint="ties")


def test_no_output_path(refuse: Refuse, pair: Pair) -> None:
    refuse("merge", "--model_path_list", *pair, says=["output_path is not given"], hint="--output_path")


def test_an_unknown_command(refuse: Refuse) -> None:
    refuse("mrege", says=["There is no command 'mrege'"], hint="'merge'")
    refuse("xyzzy", says=["There is no command 'xyzzy'"], hint="--help")


# Recipe files


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("r.json", "{", ["malformed"]),
        ("r.json", "[1]", ["not a map"]),
        ("r.json", "null", ["not a map"]),
        ("r.json", "[" * 100_000, ["malformed"]),
        ("r.json", '{"seed": ' + "9" * 5000 + "}", ["malformed"]),
        ("r.json", b"\xff\xfe\x00", ["cannot be read"]),
        ("r.json", '{"reserve_q": 1}', ["There is no setting 'reserve_q'", "'reserve_p'"]),
        ("r.json", '{"reserve_p": 1, "reserve-p": 1}', ["reserve_p", "twice"]),
        ("r.json", '{"merge_prefix": "model", "model_prefix": "model"}', ["merge_prefix", "twice"]),
        ("r.json", '{"model_path_list": "A"}', ["model_path_list is 'A'"]),
        ("r.json", '{"model_path_list": ["A", 3]}', ["model_path_list is 3"]),
        ("r.json", '{"model_path_list": ["A", "B"], "output_path": 7}', ["output_path is 7"]),
        ("r.json", '{"model_path_list": ["A\\u0000", "B"], "output_path": "C"}', ["model_path_list"]),
        ("r.json", '{"model_path_list": ["A", "B"], "output_path": "C\\u0000"}', ["output_path"]),
        ("r.json", '{"model_path_list": ["A", "B"], "rescale": null}', ["rescale is None"]),
        ("r.json", '{"model_path_list": ["A", "B"], "weight_list": [NaN, 1]}', ["weight_list is nan"]),
        ("r.json", '{"model_path_list": ["A", "B"], "weight_list": 1}', ["weight_list is 1"]),
        ("r.json", '{"model_path_list": ["A", "B"], "memory": [1]}', ["memory is [1]"]),
        ("r.json", '{"model_path_str": 5}', ["model_path_str"]),
        ("r.yaml", "a: [", ["malformed"]),
        ("r.yaml", "a: !!python/object/apply:os.system ['touch /tmp/hurt']", ["malformed"]),
        ("r.yaml", "", ["not a map"]),
        ("r.yaml", "- a\n- b\n", ["not a map"]),
        ("r.yaml", "3: 4\n", ["not a map"]),
        ("r.yml", "reserve_q: 1\n", ["There is no setting 'reserve_q'"]),
    ],
)
def test_a_wrong_recipe(refuse: Refuse, tmp_path: Path, name: str, content: str | bytes, says: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse("merge", path, says=says)


def test_a_recipe_that_is_not_there(refuse: Refuse, tmp_path: Path) -> None:
    refuse("merge", tmp_path / "r.json", says=[tmp_path / "r.json", "No such file"])
    refuse("merge", tmp_path, says=[tmp_path, "directory"])
    (tmp_path / "s.json").write_text("{}")
    refuse("merge", tmp_path / "s.json", tmp_path / "s.json", says=["s.json"])


# Places


def test_a_model_that_is_not_there(refuse: Refuse, pair: Pair, tmp_path: Path) -> None:
    missing, out = tmp_path / "D", ["--output_path", tmp_path / "C"]
    refuse("merge", "--model_path_list", pair[0], missing, *out, says=[f"There is no folder {missing}"], hint="path")
    refuse("merge", "--model_path_list", *pair, "--base_model_path", missing, *out, says=[missing], hint="path")
    long = tmp_path / ("x" * 300)
    refuse("merge", "--model_path_list", pair[0], long, *out, says=[long])


def test_a_folder_without_a_checkpoint(refuse: Refuse, pair: Pair, tmp_path: Path) -> None:
    empty, out = tmp_path / "D", ["--output_path", tmp_path / "C"]
    empty.mkdir()
    refuse(
        "merge", "--model_path_list", pair[0], empty, *out, says=[f"{empty} holds no checkpoint", "model.safetensors"]
    )
    make_model(empty, random_tensors(1), prefix="master_weights")
    refuse("merge", "--model_path_list", pair[0], empty, *out, says=[empty], hint="--merge_prefix master_weights")
    refuse("merge", "--model_path_list", pair[0], empty, *out, "--merge_prefix", "master_weights",
           says=[pair[0]], hint="--merge_prefix model")  # fmt: skip
    text = tmp_path / "notes.txt"
    text.write_text("not a model")
    refuse("merge", "--model_path_list", pair[0], text, *out, says=[text, ".safetensors"])


def test_one_shard_is_no_model(refuse: Refuse, tmp_path: Path) -> None:
    models = [make_model(tmp_path / name, random_tensors(1), shards=2) for name in "AB"]
    shard = "model-00001-of-00002.safetensors"
    refuse("merge", "--model_path_list", models[0] / shard, models[1] / shard, "--output_path", tmp_path / "C",
           says=[models[0] / shard, "shard"], hint=str(models[0]))  # fmt: skip


def test_output_equal_to_an_input(refuse: Refuse, pair: Pair, tmp_path: Path) -> None:
    merge = ["merge", "--overwrite", "--model_path_list"]
    for out in (pair[0], pair[1], pair[0] / "inside", tmp_path, f"{tmp_path}/x/../A"):
        refuse(
            *merge,
            *pair,
            "--output_path",
            out,
            says=["output_path", "one contains the other"],
            hint="another output_path",
        )
    refuse(*merge, pair[0] / "model.safetensors", pair[1], "--output_path", pair[0], says=["one contains the other"])
    (tmp_path / "link").symlink_to(pair[1])
    refuse(*merge, *pair, "--output_path", tmp_path / "link", says=["one contains the other"])
    refuse(*merge, pair[0], tmp_path / "link", "--output_path", pair[1], says=["one contains the other"])
    base = make_model(tmp_path / "base", random_tensors(3))
    refuse(*merge, *pair, "--base_model_path", base, "--output_path", base, says=["one contains the other"])


def test_a_missing_model_is_named_before_the_output(refuse: Refuse, pair: Pair, tmp_path: Path) -> None:
    refuse(
        "merge",
        "--model_path_list",
        *pair,
        tmp_path / "typo",
        "--output_path",
        tmp_path / "C",
        says=["typo"],
        hint="path",
    )


def test_output_beside_weight_files(merge: Run, pair: Pair, tmp_path: Path) -> None:
    files = [
        path.rename(tmp_path / f"{name}.safetensors")
        for path, name in zip((each / "model.safetensors" for each in pair), "AB", strict=True)
    ]
    merge("--model_path_list", *files, "--output_path", tmp_path / "C")
    assert set(read_model(tmp_path / "C")) == set(random_tensors(1))


def test_output_that_exists(refuse: Refuse, words: list[Any], tmp_path: Path) -> None:
    (tmp_path / "C").mkdir()
    (tmp_path / "C" / "precious").write_text("x")
    refuse(*words, says=[f"output_path {tmp_path / 'C'} exists"], hint="--overwrite")
    refuse("check", *words[1:], says=[f"output_path {tmp_path / 'C'} exists"], hint="--overwrite")


def test_what_no_merge_has_written_is_never_replaced(
    refuse: Refuse,
    merge: Callable[..., Said],
    words: list[Any],
    pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "C"
    for name in ("thesis.tex", "photos/1.jpg", ".git/HEAD", "data.csv", "a.txt", "link"):
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(pair[0]) if name == "link" else path.write_text("mine")
    for each in ("merge", "check"):
        text = refuse(
            each, *words[1:], "--overwrite", says=[f"output_path {out} holds files", "and more"], hint="move them"
        )
        assert (
            sum(name in text for name in ("thesis.tex", "photos/1.jpg", ".git/HEAD", "data.csv", "a.txt", "link")) == 4
        )
    monkeypatch.chdir(out)
    refuse("merge", "--model_path_list", *pair, "--output_path", ".", "--overwrite", says=["holds files"])


def test_what_came_into_an_output_is_never_replaced(
    refuse: Refuse, merge: Callable[..., Said], words: list[Any], tmp_path: Path
) -> None:
    """Neither before a merge nor while it is under way; what it wrote itself is, with all that it copied."""
    (tmp_path / "A" / "zero_to_fp32.py").write_text("x")  # Not copied unasked.
    merge(*words[1:], "--copy_file_list", "zero_to_fp32.py")
    assert (tmp_path / "C" / "zero_to_fp32.py").exists()
    merge(*words[1:], "--overwrite")
    assert not (tmp_path / "C" / "zero_to_fp32.py").exists()
    (tmp_path / "C" / "results.csv").write_text("mine")
    refuse("merge", *words[1:], "--overwrite", says=["results.csv"])
    (tmp_path / "C" / "results.csv").unlink()

    def progress(_: int) -> None:
        (tmp_path / "C" / "late.csv").write_text("mine")

    with pytest.raises(OutputError, match=r"late\.csv"):
        package.merge(model_path_list=words[2:4], output_path=tmp_path / "C", overwrite=True, progress=progress)
    assert (tmp_path / "C" / "late.csv").read_text() == "mine"


def test_a_model_that_somebody_else_has_written_may_be_replaced(
    merge: Callable[..., Said], words: list[Any], tmp_path: Path
) -> None:
    make_model(tmp_path / "C", random_tensors(3), shards=2, files={"tokenizer_config.json": "{}", "vocab.txt": ""})
    merge(*words[1:], "--overwrite")


def test_output_that_is_or_lies_in_a_file(refuse: Refuse, pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    merge = ["merge", "--overwrite", "--model_path_list", *pair, "--output_path"]
    refuse(*merge, tmp_path / "file", says=[tmp_path / "file", "is a file"])
    refuse(*merge, tmp_path / "file" / "C", says=[tmp_path / "file", "not a folder"])
    refuse(*merge, tmp_path / "file" / "deeper" / "C", says=[tmp_path / "file"])
    refuse(*merge, tmp_path / ("x" * 300), says=["x" * 300])
    refuse(*merge, tmp_path / ("x" * 250), says=["x" * 250])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_where_nothing_may_be_written(refuse: Refuse, pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o500)
    refuse("merge", "--model_path_list", *pair, "--output_path", tmp_path / "closed" / "C", says=["closed", "denied"])


def test_no_room_on_the_disk(
    refuse: Refuse, modelfuse: Run, words: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(total=1000, used=999, free=1)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    problem = f"output_path {tmp_path / 'C'} needs"
    refuse("merge", *words[1:], says=[problem, "free"], hint="another disk")
    said = modelfuse("check", *words[1:])
    assert said.status == 2
    assert problem in said.err
    assert "model.layers.*.mlp.weight" in said.out, "the plan is shown nevertheless"
    assert "no problems" not in said.out
    with pytest.raises(OutputError, match="free"):
        package.check(model_path_list=words[2:4], output_path=tmp_path / "C")
    assert asked == [tmp_path] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process as Linux has them")
def test_a_write_that_fails_half_way(tmp_path: Path) -> None:
    zeros = {"a": np.zeros(100_000, np.float32)}
    models = [make_model(tmp_path / name, zeros) for name in "AB"]
    before = snapshot(tmp_path)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from modelfuse.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    said = call("merge", "--model_path_list", *models, "--output_path", tmp_path / "C", code=code)
    assert said.status == 2, said.err
    assert "cannot be written: File too large" in said.err
    assert "Traceback" not in said.err
    assert snapshot(tmp_path) == before


def test_a_disk_that_fills_up(modelfuse: Run, words: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done is kept; test_resume.py shows how it is resumed."""
    write = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if offset > 500:
            raise OSError(28, "No space left on device")
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    said = modelfuse(*words)
    assert said.status == 2
    for part in ("model.safetensors", "No space left on device", "hint: Free some space", "note: What is done is kept"):
        assert part in said.err


def test_a_disk_that_cannot_sync(refuse: Refuse, words: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    refuse(*words, says=["cannot be written", "Input/output error"])


def test_parents_that_a_failed_merge_made_go_again(refuse: Refuse, pair: Pair, tmp_path: Path) -> None:
    tensors = random_tensors(2)
    tensors["model.norm.weight"] = np.array([1, np.nan, 2, 3], np.float32)
    bad = make_model(tmp_path / "N", tensors)
    refuse("merge", "--model_path_list", pair[0], bad, "--output_path", tmp_path / "x" / "y" / "C", says=["NaN"])


# Models that do not fit together


def test_names_that_differ(refuse: Refuse, tmp_path: Path) -> None:
    layers = {f"layers.{number}.up.weight": np.ones(3, np.float32) for number in range(30)}
    a = make_model(tmp_path / "A", {**layers, "norm": np.ones(2, np.float32)})
    b = make_model(tmp_path / "B", {"norm": np.ones(2, np.float32), "extra.bias": np.ones(2, np.float32)})
    said = refuse("merge", "--model_path_list", a, b, "--output_path", tmp_path / "C",
                  says=[f"not in {b}: layers.*.up.weight (30 tensors)", f"not in {a}: extra.bias"],
                  hint="one base")  # fmt: skip
    assert "layers.7" not in said


def test_shapes_that_differ(refuse: Refuse, tmp_path: Path) -> None:
    a = make_model(
        tmp_path / "A", {"x.0": np.ones((2, 3), np.float32), "x.1": np.ones((2, 3), np.float32), "y": np.ones(1)}
    )
    b = make_model(
        tmp_path / "B", {"x.0": np.ones((3, 2), np.float32), "x.1": np.ones((3, 2), np.float32), "y": np.ones(2)}
    )
    refuse(
        "check",
        "--model_path_list",
        a,
        b,
        says=["x.* (2 tensors) has the shapes", f"[2, 3] in {a}", f"[3, 2] in {b}", f"[1] in {a}"],
        hint="one base",
    )


def test_very_many_differences_stay_readable(refuse: Refuse, tmp_path: Path) -> None:
    a = make_model(tmp_path / "A", {f"name{number}": np.ones(1, np.float32) for number in range(200)})
    b = make_model(tmp_path / "B", {"other": np.ones(1, np.float32)})
    said = refuse("check", "--model_path_list", a, b, says=["name0", "and 180 more", "other"])
    assert len(said.splitlines()) < 30


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_integers_against_floats(refuse: Refuse, tmp_path: Path, order: tuple[int, int]) -> None:
    models = [
        make_model(tmp_path / "A", {"x": np.ones(4, np.float32)}),
        make_model(tmp_path / "B", {"x": np.ones(4, np.int32)}),
    ]
    refuse(
        "check",
        "--model_path_list",
        *(models[each] for each in order),
        says=["x is ", "float32", "int32"],
        hint="in the same dtype",
    )


def test_kinds_of_integers_that_differ(refuse: Refuse, tmp_path: Path) -> None:
    models = [
        make_model(tmp_path / "A", {"x": np.ones(4, np.int64)}),
        make_model(tmp_path / "B", {"x": np.ones(4, np.int32)}),
    ]
    refuse("check", "--model_path_list", *models, says=["x is int64, int32"], hint="in the same dtype")


def test_integers_that_differ(refuse: Refuse, merge: Run, tmp_path: Path) -> None:
    models = []
    for number, name in enumerate("AB"):
        tensors: dict[str, np.ndarray | Stored] = {
            "w": np.full(4, number, np.float32),
            "ids": np.arange(4) + number,
            "same": np.arange(5),
            "flag": np.array(bool(number)),
        }
        models.append(make_model(tmp_path / name, tensors))
    words = ["--model_path_list", *models, "--output_path", tmp_path / "C"]
    said = refuse("merge", *words, says=["ids", "flag", models[1]], hint="--unmerged_from")
    assert "same" not in said
    merge(*words, "--unmerged_from", models[1])
    merged = read_model(tmp_path / "C")
    assert array(merged["ids"]).tolist() == [1, 2, 3, 4]
    assert array(merged["flag"]).tolist() is True
    assert array(merged["same"]).tolist() == [0, 1, 2, 3, 4]
    assert array(merged["w"]).tolist() == [0.5] * 4


def test_integers_from_the_base(merge: Run, tmp_path: Path) -> None:
    models = [
        make_model(tmp_path / name, {"w": np.ones(2, np.float32), "ids": np.full(3, number)})
        for number, name in enumerate("ABZ")
    ]
    merge(
        "--model_path_list",
        *models[:2],
        "--base_model_path",
        models[2],
        "--output_path",
        tmp_path / "C",
        "--unmerged_from",
        models[2],
    )
    assert array(read_model(tmp_path / "C")["ids"]).tolist() == [2, 2, 2]


def test_a_tied_head_that_is_not_its_embedding(refuse: Refuse, tmp_path: Path) -> None:
    tied = {"model_type": "llama", "tie_word_embeddings": True}
    same = np.ones((5, 2), np.float32)
    a = make_model(tmp_path / "A", {"model.embed_tokens.weight": same, "lm_head.weight": same}, config=tied)
    b = make_model(tmp_path / "B", {"model.embed_tokens.weight": same, "lm_head.weight": same * 2}, config=tied)
    said = refuse(
        "merge",
        "--model_path_list",
        a,
        b,
        "--output_path",
        tmp_path / "C",
        says=["lm_head.weight", "model.embed_tokens.weight", b, "tie"],
        hint="tie_word_embeddings",
    )
    assert "--unmerged_from" not in said


def test_a_tied_head_of_another_shape(refuse: Refuse, tmp_path: Path) -> None:
    tied = {"model_type": "llama", "tie_word_embeddings": True}
    tensors = {"model.embed_tokens.weight": np.ones((8, 2), np.float32), "lm_head.weight": np.ones((5, 2), np.float32)}
    models = [make_model(tmp_path / name, tensors, config=tied) for name in "AB"]
    refuse("merge", "--model_path_list", *models, "--output_path", tmp_path / "C",
           says=["lm_head.weight", "model.embed_tokens.weight", models[0]])  # fmt: skip


def test_layouts_that_differ(refuse: Refuse, tmp_path: Path) -> None:
    square = {"model.layers.0.self_attn.q_proj.weight": np.ones((4, 4), np.float32)}
    paddle = make_model(tmp_path / "P", square, config={"model_type": "llama", "source": "paddle"})
    other = make_model(tmp_path / "H", square, config={"model_type": "llama"})
    refuse("check", "--model_path_list", other, paddle, says=[paddle, other, "square"], hint="--input_layout")


def test_quantized_models(refuse: Refuse, pair: Pair, tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "gptq"}}
    gptq = make_model(tmp_path / "Q", random_tensors(1), config=config)
    refuse("check", "--model_path_list", pair[0], gptq, says=[gptq, "gptq"], hint="unquantized")


# Values


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "della", "dare_linear"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_that_are_not_finite(
    refuse: Refuse, modelfuse: Run, pair: Pair, tmp_path: Path, value: float, method: str, dtype: str
) -> None:
    tensors = random_tensors(2, dtype=dtype)
    wide = np.array([1, value, 2, 3], np.float32)
    tensors["model.norm.weight"] = bf16(wide) if dtype == "bfloat16" else wide
    bad = make_model(tmp_path / "N", tensors)
    words = ["merge", "--model_path_list", pair[0], bad, "--output_path", tmp_path / "C", "--merge_method", method]
    refuse(*words, says=["'model.norm.weight'", bad, "NaN"], hint="--on_nonfinite propagate")
    assert modelfuse(*words, "--on_nonfinite", "propagate").status == 0
    entry = json.loads((tmp_path / "C" / "merge_report.json").read_text())["tensors"]["model.norm.weight"]
    assert entry["nonfinite"]["sources"] == [0, 1]
    if method == "linear":
        merged = array(read_model(tmp_path / "C")["model.norm.weight"])
        assert np.isfinite(merged).tolist() == [True, False, True, True]
        assert entry["nonfinite"]["output"] == 1


def test_a_base_that_is_not_finite(refuse: Refuse, pair: Pair, tmp_path: Path) -> None:
    tensors = random_tensors(2)
    tensors["lm_head.weight"][3, 2] = np.nan
    base = make_model(tmp_path / "N", tensors)
    refuse("merge", "--model_path_list", *pair, "--base_model_path", base, "--output_path", tmp_path / "C",
           says=["'lm_head.weight'", base], hint="--on_nonfinite")  # fmt: skip


def test_an_output_that_overflows(refuse: Refuse, modelfuse: Run, tmp_path: Path) -> None:
    models = [make_model(tmp_path / name, {"w": np.array([60000, 1], np.float16)}) for name in "AB"]
    words = ["merge", "--model_path_list", *models, "--weight_list", 1, 1, "--output_path", tmp_path / "C"]
    refuse(*words, says=["'w'", "overflows"], hint="--output_dtype")
    assert modelfuse(*words, "--output_dtype", "float32").status == 0
    assert array(read_model(tmp_path / "C")["w"]).tolist() == [120000, 2]
    assert modelfuse(*words, "--overwrite", "--on_nonfinite", "propagate").status == 0
    assert array(read_model(tmp_path / "C")["w"]).tolist() == [np.inf, 2]


def test_an_output_type_too_narrow(refuse: Refuse, tmp_path: Path) -> None:
    models = [make_model(tmp_path / name, {"w": np.array([1e30, 1], np.float32)}) for name in "AB"]
    refuse("merge", "--model_path_list", *models, "--output_dtype", "float16", "--output_path", tmp_path / "C",
           says=["'w'", "overflows"], hint="--output_dtype")  # fmt: skip
