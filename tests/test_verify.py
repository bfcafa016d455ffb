"""``modelfuse verify``: what it finds, what it says of it, and that a sound output passes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from conftest import STEPS, Said, Stored, bf16, call, make_model, random_tensors, read_file, save_file, snapshot

import modelfuse as package
from modelfuse.checkpoints.config_checks import contradictions
from modelfuse.checkpoints.formats.safetensors import read_safetensors
from modelfuse.checkpoints.tensor_names import pattern

Run = Callable[..., Said]
Edit = Callable[[dict[str, Any]], object]
CONFIG = {"model_type": "llama", "vocab_size": 11, "hidden_size": 4, "num_hidden_layers": 2}
EMBEDDING, FIRST, SECOND = (f"model.{name}.weight" for name in ("embed_tokens", "layers.0.mlp", "layers.1.mlp"))


def models(folder: Path, dtype: str = "bfloat16") -> list[Path]:
    """Two models with a tensor of integers and one without elements."""
    made = []
    for seed, name in enumerate("AB"):
        made.append(make_model(folder / name, more_tensors(seed, dtype), config=CONFIG, files={"tokenizer.json": "{}"}))
    return made


def more_tensors(seed: int, dtype: str = "float32") -> dict[str, np.ndarray | Stored]:
    return {**random_tensors(seed, dtype=dtype), "none": np.ones((0, 3), np.float32), "ids": np.arange(5)}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A merge of two models into one file."""
    package.merge(model_path_list=models(tmp_path), output_path=tmp_path / "C")
    return tmp_path / "C"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in shards of one or two tensors."""
    package.merge(model_path_list=models(tmp_path), output_path=tmp_path / "D", max_shard_size=100)
    return tmp_path / "D"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def without_inputs(folder: Path) -> Path:
    """Take the inputs away, so that only what needs none is checked."""
    for name in "AB":
        (folder.parent / name).rename(folder.parent / f"{name} elsewhere")
    return folder


def problems(folder: Path, **settings: Any) -> dict[str, list[str]]:
    """What is wrong, by kind."""
    before = snapshot(folder)
    found = package.verify(folder, **settings)
    assert snapshot(folder) == before
    assert found.holds == (not found.problems)
    by_kind: dict[str, list[str]] = {}
    for problem in found.problems:
        assert problem.tensor is None or problem.tensor in problem.message or problem.kind == "recipe"
        by_kind.setdefault(problem.kind, []).append(problem.message)
    return by_kind


def checksum(data: bytes) -> str:
    blocks = (data[start : start + 262144] for start in range(0, len(data), 262144))
    return str(xxhash.xxh3_128(b"".join(xxhash.xxh3_128(block).digest() for block in blocks)).hexdigest())


def edit_report(folder: Path, edit: Edit, own_checksum: bool = True) -> None:
    """Edit the report, by a forger who makes its own checksum hold again, or by one who does not."""
    path = folder / "merge_report.json"
    report = json.loads(path.read_text())
    edit(report)
    if own_checksum:
        del report["report_sha256"]
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        report["report_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def flip(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


# What is sound


@pytest.mark.parametrize("with_base", [False, True], ids=["alone", "base"])
@pytest.mark.parametrize("steps", STEPS, ids=" ".join)
def test_every_method_is_merged_again_in_part_and_whole(
    merge: Run, modelfuse: Run, tmp_path: Path, steps: list[str], with_base: bool
) -> None:
    inputs = models(tmp_path)
    inputs.append(make_model(tmp_path / "base", more_tensors(9)))
    base = ["--base_model_path", inputs[2]] if with_base else []
    merge("--model_path_list", *inputs[:2], *base, *steps, "--output_path", tmp_path / "C", "--seed", 3)
    said = modelfuse("verify", tmp_path / "C")
    assert said.status == 0, said.err
    found = package.verify(tmp_path / "C", full=True, n_process=3)
    assert (found.holds, found.tensors, found.recomputed) == (True, 7, 7)
    assert package.verify(tmp_path / "C", sample=2).recomputed == 2


def test_a_sharded_output_that_was_moved(sharded: Path) -> None:
    moved = sharded.rename(sharded.with_name("elsewhere"))
    assert problems(moved, full=True) == {}


def test_tensors_of_many_blocks_and_spans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelfuse.inspection.verify.SPAN_BYTES", 1 << 18)
    monkeypatch.setattr("modelfuse.execution.run.SPAN", 1 << 18)
    inputs = []
    for seed, name in enumerate("AB"):
        random = np.random.default_rng(seed)
        inputs.append(make_model(tmp_path / name, {"big": bf16(random.standard_normal((700, 1001)))}))
    folder = tmp_path / "C"
    package.merge(model_path_list=inputs, output_path=folder, merge_method="della")
    assert problems(folder, full=True, n_process=3) == {}
    stored = read_safetensors(shards(folder)[0])[0]["big"]
    for element in (650_000, 500_001):
        flip(shards(folder)[0], stored.offset + 2 * element)
    found = problems(folder, full=True, n_process=3)
    assert len(found["checksum"]) == 1
    assert "element 500,001 on" in found["bytes"][0]


def test_settings_that_change_what_is_written(merge: Run, tmp_path: Path) -> None:
    inputs = models(tmp_path, "float32")
    merge("--model_path_list", *inputs, "--output_path", tmp_path / "C", "--output_dtype", "bfloat16",
          "--weight_list", 1, 3, "--normalize", "--max_shard_size", 50, "--memory", 1)  # fmt: skip
    assert problems(tmp_path / "C", full=True) == {}


def test_inputs_that_are_files(merge: Run, tmp_path: Path) -> None:
    inputs = [folder / "model.safetensors" for folder in models(tmp_path)]
    merge("--model_path_list", *inputs, "--output_path", tmp_path / "C")
    assert problems(tmp_path / "C", full=True) == {}


def test_tied_and_odd_names(merge: Run, tmp_path: Path) -> None:
    for seed, name in enumerate("AB"):
        tensors = random_tensors(seed)
        tensors["lm_head.weight"] = tensors[EMBEDDING]
        tensors["[bold]ü "] = np.ones(3, np.float32)
        make_model(tmp_path / name, tensors, config={"tie_word_embeddings": True})
    merge("--model_path_list", tmp_path / "A", tmp_path / "B", "--output_path", tmp_path / "C")
    assert problems(tmp_path / "C", full=True) == {}


def test_a_sample_is_chosen_by_its_seed_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelfuse.inspection.recompute import choose

    plan = package.check(model_path_list=models(tmp_path), output_path=None)
    stored = {tensor.name: tensor.sources[0] for tensor in plan.tensors}

    def names(seed: int, sample: int | None = 3) -> list[str]:
        return [tensor.name for tensor in choose(plan, stored, False, sample, seed).tensors]

    assert names(1) == names(1)
    assert len({tuple(names(seed)) for seed in range(20)}) > 5
    assert len(names(1, None)) == 7
    monkeypatch.setattr("modelfuse.inspection.recompute.SAMPLE_BYTES", 1)
    assert len(names(1, None)) in (4, 5)  # One has no bytes.


# What is not


def test_one_flipped_bit_anywhere(out: Path) -> None:
    """Of every file that the merge wrote, whatever the bit means; without the inputs."""
    without_inputs(out)
    random = np.random.default_rng(0)
    for path in sorted(out.iterdir()):
        content = path.read_bytes()
        for offset in {0, len(content) - 1, *random.integers(0, len(content), 60).tolist()}:
            flip(path, offset, bit := int(random.integers(8)))
            try:
                found = problems(out)
            except package.CheckpointError as error:
                found = {"report": [error.message]}
                assert path.name == "merge_report.json"
            assert found, (path, offset, bit)
            assert any(path.name in message for messages in found.values() for message in messages), found
            path.write_bytes(content)
    assert problems(out) == {}


def test_a_flipped_bit_of_a_tensor_is_named(out: Path, modelfuse: Run) -> None:
    stored = read_safetensors(shards(out)[0])[0][SECOND]
    flip(shards(out)[0], stored.offset + 2 * 7 + 1, 7)
    said = modelfuse("verify", out, "--full")
    assert (said.status, said.out) == (2, "")
    _, checksum_line, bytes_line, last = said.err.splitlines()
    assert checksum_line.startswith(f"problem: {SECOND} in model.safetensors does not have the bytes that were merged")
    assert bytes_line.startswith(
        f"problem: {SECOND} in model.safetensors is not what the recipe gives, from element 7 on"
    )
    assert last == f"not verified: 2 problems in {out}"


def test_swapped_shards(sharded: Path) -> None:
    one, other = shards(sharded)[:2]
    names = [set(read_file(path)[0]) for path in (one, other)]
    aside = one.with_name("aside")
    one.rename(aside), other.rename(one), aside.rename(other)
    found = problems(sharded)
    for name, there, wanted in [*((name, other, one) for name in names[0]), *((name, one, other) for name in names[1])]:
        assert f"{name} is in {there.name}, not in {wanted.name} as reported" in found["tensor"]


def test_a_shard_of_another_merge(sharded: Path, tmp_path: Path) -> None:
    package.merge(
        model_path_list=[tmp_path / "A", tmp_path / "B"], output_path=tmp_path / "E", max_shard_size=100,
        merge_method="slerp",
    )  # fmt: skip
    shutil.copy(shards(tmp_path / "E")[1], shards(sharded)[1])
    found = problems(without_inputs(sharded))
    assert set(found) == {"checksum"}
    assert len(found["checksum"]) == len(read_file(shards(sharded)[1])[0])


def test_two_tensors_exchanged(out: Path) -> None:
    """Their names in the header, so that every byte of the data is where it was."""
    tensors, metadata = read_file(shards(out)[0])
    names = [{FIRST: SECOND, SECOND: FIRST}.get(name, name) for name in tensors]
    save_file(shards(out)[0], dict(zip(names, tensors.values(), strict=True)), metadata)
    found = problems(out, full=True)
    assert (
        f"{FIRST} in model.safetensors does not have the bytes that were merged: they are those of {SECOND}"
        in found["checksum"]
    )
    assert (
        f"{SECOND} in model.safetensors does not have the bytes that were merged: they are those of {FIRST}"
        in found["checksum"]
    )
    assert len(found["checksum"]) == len(found["bytes"]) == 2


@pytest.mark.parametrize("change", ["missing", "added", "shape", "dtype"])
def test_headers_that_do_not_fit(out: Path, change: str) -> None:
    tensors, metadata = read_file(shards(out)[0])
    if change == "missing":
        del tensors[FIRST]
    elif change == "added":
        tensors["more"] = Stored("U8", (1,), b"x")
    else:
        shape, dtype = ((5, 4), "BF16") if change == "shape" else ((4, 5), "F16")
        tensors[FIRST] = Stored(dtype, shape, tensors[FIRST].data)
    save_file(shards(out)[0], tensors, metadata)
    wanted = {
        "missing": f"{FIRST} is missing from model.safetensors",
        "added": "more in model.safetensors is no tensor of the merge",
        "shape": f"{FIRST} in model.safetensors has the shape [5, 4], reported is [4, 5]",
        "dtype": f"{FIRST} in model.safetensors is float16, reported is bfloat16",
    }
    found = problems(out, full=True)
    assert found["tensor"] == [wanted[change]]
    assert "checksum" not in found


def test_a_missing_shard_names_its_tensors(sharded: Path) -> None:
    path = shards(sharded)[1]
    names = list(read_file(path)[0])
    path.unlink()
    (message,) = problems(sharded, full=True)["file"]
    assert message.startswith(f"{path.name} is missing; it should hold ")
    assert all(pattern(name) in message for name in names)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file(out: Path, keep: int) -> None:
    os.truncate(shards(out)[0], keep % shards(out)[0].stat().st_size)
    found = problems(out)
    assert any("when it was written" in message for message in found["file"])
    assert any("not a valid safetensors file" in message and pattern(SECOND) in message for message in found["file"])


def test_bytes_behind_the_end(out: Path) -> None:
    with open(shards(out)[0], "ab") as file:
        file.write(b"x")
    assert "model.safetensors has" in problems(out)["file"][0]


def test_a_file_too_many(sharded: Path) -> None:
    shutil.copy(shards(sharded)[0], sharded / "model.safetensors")
    assert problems(sharded)["file"] == ["model.safetensors is not one of the merge's files"]


def test_side_files(out: Path) -> None:
    (out / "tokenizer.json").write_text("{ }")
    (out / "config.json").unlink()
    (out / "NOTES.md").write_text("Written by the user, so none of our business.")
    found = problems(out)
    assert found == {
        "file": [
            "config.json: No such file or directory",
            "tokenizer.json is not as it was written (its sha256 differs)",
        ]
    }


INDEX_EDITS: dict[str, tuple[Edit, str]] = {
    "a tensor gone": (lambda index: index["weight_map"].pop(FIRST), f"does not name {FIRST}"),
    "a tensor more": (lambda index: index["weight_map"].update(more="x"), "names more, which is no tensor"),
    "another file": (
        lambda index: index["weight_map"].update({FIRST: "x"}),
        f"puts {FIRST} into x, reported is model-",
    ),
    "another size": (lambda index: index["metadata"].update(total_size=7), "total_size is 7, the tensors have "),
    "no metadata": (lambda index: index.pop("metadata"), "total_size is None"),
    "no map": (lambda index: index.pop("weight_map"), "has no weight_map"),
}


@pytest.mark.parametrize("name", INDEX_EDITS)
def test_an_index_that_is_wrong(sharded: Path, name: str) -> None:
    edit, says = INDEX_EDITS[name]
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))
    (message,) = problems(sharded)["index"]
    assert message.startswith(path.name)
    assert says in message


def test_an_index_that_is_missing_malformed_or_too_many(sharded: Path, out: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    shutil.copy(path, out)
    assert problems(out)["index"] == [f"{path.name} is not one of the merge's files; loaders would follow it"]
    path.write_text("{")
    assert "is not valid JSON" in problems(sharded)["index"][0]
    path.unlink()
    assert problems(sharded)["index"] == [f"{path.name} is missing"]


# Reports and recipes


REPORT_EDITS: dict[str, tuple[Edit, str]] = {
    "checksum": (lambda report: report["tensors"][FIRST].update(checksum="0" * 32), "does not have the bytes"),
    "dtype": (lambda report: report["tensors"][FIRST].update(dtype="F16"), "is bfloat16, reported is float16"),
    "shape": (lambda report: report["tensors"][FIRST].update(shape=[20]), "reported is [20]"),
    "file": (lambda report: report["tensors"][FIRST].update(file="x"), "is reported in x, which is not listed"),
    "tensor": (lambda report: report["tensors"].pop(FIRST), f"{FIRST} in model.safetensors is no tensor of the merge"),
    "size": (lambda report: report["files"].update({"model.safetensors": 5}), "; it had 5 when it was written"),
    "files": (lambda report: report["files"].update({"m.safetensors": 5}), "m.safetensors is missing"),
    "header": (lambda report: report["sha256"].update({"model.safetensors": ""}), "its header has changed"),
    "side file": (lambda report: report["sha256"].update({"config.json": ""}), "config.json is not as it was written"),
    "seed": (lambda report: report["method"].update(seed=5), "the seed: merge_config.json says 0, merge_report.json 5"),
    "weights": (lambda report: report["method"].update(effective_weights=[1, 0]), "says [0.5, 0.5], merge_report"),
    "method": (lambda report: report["method"].update(merge_type="ties"), "merge_type: merge_config.json says linear"),
}  # fmt: skip


@pytest.mark.parametrize("name", REPORT_EDITS)
def test_an_edited_report(out: Path, name: str) -> None:
    edit, says = REPORT_EDITS[name]
    without_inputs(out)
    path = out / "merge_report.json"
    content = path.read_bytes()
    edit_report(out, edit)
    found = problems(out)
    assert "report" not in found or name == "file"
    assert any(says in message for messages in found.values() for message in messages), found
    path.write_bytes(content)
    edit_report(out, edit, own_checksum=False)
    assert "its own checksum does not hold" in problems(out)["report"][0]


def test_an_edit_that_changes_nothing_else(out: Path) -> None:
    for edit in (
        lambda report: report.update(modelfuse_version="9"), lambda report: report["left_out"].append({}),
    ):  # fmt: skip
        content = (out / "merge_report.json").read_bytes()
        edit_report(out, edit, own_checksum=False)
        assert list(problems(out)) == ["report"]
        (out / "merge_report.json").write_bytes(content.replace(b"{", b"{ ", 1))
        assert list(problems(out)) == ["report"]
        (out / "merge_report.json").write_bytes(content)


MALFORMED: dict[str, tuple[Edit, str]] = {
    "no tensors": (lambda report: report.pop("tensors"), "required field `tensors`"),
    "a file outside": (lambda report: report["files"].update({"../A/model.safetensors": 1}), "inside the folder"),
    "an absolute file": (lambda report: report["sha256"].update({"/etc/passwd": ""}), "inside the folder"),
    "a dtype": (
        lambda report: report["tensors"][FIRST].update(dtype="F17"),
        f"tensor {FIRST}: Invalid enum value 'F17' - at `$.dtype`",
    ),
    "a shape": (
        lambda report: report["tensors"][FIRST].update(shape=[-1]),
        f"tensor {FIRST}: Expected `int` >= 0 - at `$.shape[0]`",
    ),
    "a URL of nothing": (lambda report: report["inputs"][0].update(path="s3://"), "names no bucket"),
    "kinds": (lambda report: report.update(files=[1]), "at `$.files`"),
    "checksums": (lambda report: report.update(checksum="md5"), "checksums of the kind 'md5'"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_report_that_cannot_be_understood(refuse: Callable[..., str], out: Path, name: str) -> None:
    edit, says = MALFORMED[name]
    edit_report(out, edit)
    refuse("verify", out, "--quiet", says=[out, says])


def test_a_report_that_names_what_no_file_can_be_called(out: Path) -> None:
    edit_report(out, lambda report: report["files"].update({"x" * 5000: 1}))
    assert any("x is missing" in problem for problem in problems(out)["file"])


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_report_that_is_none(refuse: Callable[..., str], out: Path, content: bytes) -> None:
    (out / "merge_report.json").write_bytes(content)
    refuse("verify", out, "--quiet", says=["merge_report.json"])


def test_a_folder_that_is_no_output(refuse: Callable[..., str], out: Path, tmp_path: Path) -> None:
    refuse("verify", tmp_path / "A", "--quiet", says=[tmp_path / "A", "is not the output of a merge"])
    refuse("verify", tmp_path / "nowhere", "--quiet", says=["There is no folder"])
    refuse("verify", out / "config.json", "--quiet", says=["There is no folder"])


def test_a_recipe_that_is_none(out: Path) -> None:
    path = out / "merge_config.json"
    path.write_text("{}")
    found = problems(out)
    assert "model_path_list is not given" in found["recipe"][0]
    path.unlink()
    assert problems(out) == {"file": ["merge_config.json: No such file or directory"]}
    edit_report(out, lambda report: report["sha256"].pop("merge_config.json"))
    assert problems(out) == {"recipe": ["merge_config.json is missing"]}


def test_a_recipe_of_another_merge(out: Path, tmp_path: Path) -> None:
    package.merge(
        model_path_list=[tmp_path / "B", tmp_path / "A"], weight_list=[1, 2], output_path=tmp_path / "E",
        output_dtype="float32", max_shard_size=100,
    )  # fmt: skip
    shutil.copy(tmp_path / "E" / "merge_config.json", out)
    found = problems(out, full=True)["recipe"]
    assert any(message.startswith("the weights: ") for message in found)
    assert any(message.startswith("the inputs: ") for message in found)
    assert any(
        message.startswith(f"{FIRST}: merge_config.json and its inputs give float32 [4, 5]") for message in found
    )


# Inputs


def forge(folder: Path, name: str, element: int) -> None:
    """A wrong merge that is sound in itself: other bytes, with every checksum made to hold."""
    path = shards(folder)[0]
    stored = read_safetensors(path)[0][name]
    flip(path, stored.offset + element * stored.dtype.bytes)
    data = path.read_bytes()[stored.offset :][: stored.nbytes]
    edit_report(folder, lambda report: report["tensors"][name].update(checksum=checksum(data)))


@pytest.mark.parametrize("name", [FIRST, "ids"])
def test_a_wrong_merge_is_found_by_merging_again(out: Path, name: str) -> None:
    forge(out, name, 3)
    found = problems(out, full=True)
    assert list(found) == ["bytes"]
    assert found["bytes"][0].startswith(f"{name} in model.safetensors is not what the recipe gives, from element 3 on")
    assert problems(out) == found
    outcomes = {bool(problems(out, sample=3, seed=seed)) for seed in range(12)}
    assert outcomes == {True, False}
    assert problems(without_inputs(out)) == {}


def test_missing_inputs(out: Path, modelfuse: Run, tmp_path: Path) -> None:
    (tmp_path / "A" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "B")
    said = modelfuse("verify", out)
    assert said.status == 0, said.err
    assert "merged again, with" not in said.out
    for missing in (tmp_path / "A" / "model.safetensors", tmp_path / "B"):
        assert f"note: nothing was merged again: {missing} is missing" in said.out
    said = modelfuse("verify", out, "--full")
    assert said.status == 2
    for missing in (tmp_path / "A" / "model.safetensors", tmp_path / "B"):
        assert f"problem: Not all can be merged again: {missing} is missing" in said.err


def test_an_input_of_another_size(out: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "A", {"w": np.ones(3, np.float32)})
    found = package.verify(out)
    assert found.holds
    assert found.recomputed == 0
    assert str(tmp_path / "A" / "model.safetensors") in found.absent[0]
    assert "has changed" in found.absent[0]
    assert "has changed" in problems(out, full=True)["inputs"][0]


def test_an_input_of_the_same_size(out: Path, tmp_path: Path) -> None:
    path = tmp_path / "A" / "model.safetensors"
    os.utime(path, (0, 0))
    assert problems(out, full=True) == {}
    flip(path, read_safetensors(path)[0][SECOND].offset + 1, 6)
    found = problems(out, full=True)
    assert SECOND in found["bytes"][0]
    assert found["inputs"] == [f"Modified since the merge: {path}"]


def test_an_input_that_cannot_be_merged_any_more(out: Path, tmp_path: Path) -> None:
    path = tmp_path / "A" / "model.safetensors"
    flip(path, 8)
    assert "not a valid safetensors file" in problems(out)["inputs"][0]
    flip(path, 8)
    data = bytearray(path.read_bytes())
    start = read_safetensors(path)[0][FIRST].offset
    data[start : start + 2] = b"\x80\x7f"
    path.write_bytes(data)
    found = problems(out, full=True)["inputs"]
    assert any(FIRST in message and "infinite" in message for message in found)


# The command


def test_what_is_said(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kernels"))
    first, said = call("verify", out), call("verify", out)
    assert (first.status, said.status) == (0, 0), said.err
    assert first.err.splitlines() == [f"verifying {out}"]
    assert said.err == f"verifying {out}\n"
    assert said.out.startswith("verified 7 tensors in ")
    assert said.out.endswith(f"in {out}: every checksum holds; all merged again, with the same bytes\n")


def test_flags(modelfuse: Run, out: Path) -> None:
    said = modelfuse("verify", out, "--sample", 2, "--n-process=2", "--seed", 5)
    assert "2 of them (seed 5) merged again" in said.out
    assert modelfuse("verify", out, "--quiet", "--full") == Said(0, "", "")
    flip(shards(out)[0], -1)
    assert modelfuse("verify", out, "--quiet").err.startswith("problem: ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "folder"),
        (["C", "--sample", "0"], "sample is 0"),
        (["C", "--n_process", "0"], "n_process is 0"),
        (["C", "--seed", "-1"], "seed is -1"),
        (["C", "--seed", "x"], "invalid int value: 'x'"),
        (["C", "--whole"], "--whole"),
    ],
)
def test_wrong_words(refuse: Callable[..., str], words: list[str], says: str) -> None:
    refuse("verify", *words, *(["--quiet"] if words else []), says=[says])


def test_help_names_every_flag(modelfuse: Run) -> None:
    said = modelfuse("verify", "--help")
    assert said.status == 0
    assert all(flag in said.out for flag in ("--full", "--sample", "--n_process", "--seed", "--quiet"))


def test_very_many_problems_stay_readable(modelfuse: Run, tmp_path: Path) -> None:
    inputs = [make_model(tmp_path / name, {str(each): np.ones(1, np.float32) for each in range(200)}) for name in "AB"]
    package.merge(model_path_list=inputs, output_path=tmp_path / "C")
    tensors, metadata = read_file(shards(tmp_path / "C")[0])
    save_file(shards(tmp_path / "C")[0], {f"x{name}": each for name, each in tensors.items()}, metadata)
    lines = modelfuse("verify", tmp_path / "C").err.splitlines()
    assert len(lines) < 60
    assert lines[-2].startswith("problem: and ")


def test_progress_counts_every_byte(out: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = package.verify(out, full=True, progress=lambda count, whole: seen.append((count, whole)), n_process=2)
    assert {whole for _, whole in seen} == {found.nbytes}
    assert sum(count for count, _ in seen) == found.nbytes


def test_without_inputs_no_compiler_is_loaded(out: Path) -> None:
    without_inputs(out)
    code = "import sys, modelfuse; assert modelfuse.verify(sys.argv[1]).holds; print('numba' in sys.modules)"
    assert call(out, code=code).out == "False\n"


# config.json against the shapes

SHAPES = {
    "model.embed_tokens.weight": (11, 4), "lm_head.weight": (11, 4), "model.norm.weight": (4,),
    **{f"model.layers.{layer}.mlp.{name}_proj.weight": shape for layer in range(2)
       for name, shape in (("up", (6, 4)), ("gate", (6, 4)), ("down", (4, 6)))},
}  # fmt: skip
FITTING = {"vocab_size": 11, "hidden_size": 4, "num_hidden_layers": 2, "intermediate_size": 6}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"vocab_size": 12}, ["vocab_size is 12, but model.embed_tokens.weight", "vocab_size is 12, but lm_head"]),
        ({"hidden_size": 8}, ["hidden_size is 8, but model.embed_tokens.weight is [11, 4]"]),
        ({"num_hidden_layers": 3}, ["is 3, but 1 of model.layers.0 to model.layers.2 have no tensors"]),
        ({"num_hidden_layers": 1}, ["num_hidden_layers is 1, but there is model.layers.1."]),
        ({"intermediate_size": 7}, ["intermediate_size is 7, but model.layers.0.mlp.up_proj.weight is [6, 4]"]),
        ({"text_config": {"vocab_size": 10}}, ["vocab_size is 10", "vocab_size is 10"]),
        ({"num_hidden_layers": 1, "num_nextn_predict_layers": 1}, []),
        ({"hidden_size": 8, "word_embed_proj_dim": 4}, []),
        ({"vocab_size": 12, "is_encoder_decoder": True}, []),
        ({"vocab_size": "12", "hidden_size": None, "intermediate_size": [7, 7], "num_hidden_layers": True}, []),
        ({"text_config": "?"}, []),
    ],
)  # fmt: skip
def test_contradictions(changed: dict[str, object], says: list[str]) -> None:
    found = [message for _, message in contradictions({**FITTING, **changed}, SHAPES)]
    assert len(found) == len(says), found
    assert all(part in message for part, message in zip(says, found, strict=True))


def test_other_names_are_left_alone() -> None:
    for extra in ({"vision.embed_tokens.weight": (3, 3)}, {"model.vision_embed_tokens.weight": (3, 3)}):
        assert list(contradictions(FITTING, {**SHAPES, **extra})) == []
    assert list(contradictions(FITTING, {"w": (1,)})) == []
    transposed = {**SHAPES, "lm_head.weight": (4, 11)}
    assert list(contradictions(FITTING, transposed)) == []


def test_a_config_that_contradicts_the_shapes(merge: Run, modelfuse: Run, tmp_path: Path) -> None:
    config = {**CONFIG, "vocab_size": 12}
    inputs = [make_model(tmp_path / name, random_tensors(1), config=config) for name in "AB"]
    merge("--model_path_list", *inputs, "--output_path", tmp_path / "C")
    said = modelfuse("verify", tmp_path / "C")
    assert said.status == 2
    assert f"problem: config.json: vocab_size is 12, but {EMBEDDING} is [11, 4]" in said.err
