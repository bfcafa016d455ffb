"""Every text that a user or a stranger can hand in, damaged: a result or a short error, and nothing else.

The pickled formats have a file of their own, test_pickle_hostile.py. What was found stays in ``CORPUS``.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from adapting import Q, factors, make_base, make_paddle, make_peft
from conftest import Said, make_model, random_tensors, snapshot
from hostile import EFFORT, bounded, json_files, texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Run = Callable[..., Said]
Hostile = Callable[..., int]
fuzz = settings(max_examples=40 * EFFORT, deadline=None, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
RECIPE = {
    "model_path_list": ["A", "B"], "base_model_path": "base", "output_path": "C", "merge_method": "della",
    "weight_list": [1, 0.5], "normalize": True, "reserve_p": 0.5, "epsilon": 0.1, "seed": 3, "n_process": 2,
    "memory": "300MB", "max_shard_size": "5GB", "output_dtype": "float32", "overwrite": False,
    "copy_file_list": ["notes.txt"], "modelfuse_version": "0.1.0",
}  # fmt: skip
YAML = b"""# a recipe
merge_method: ties
model_path_list:
  - A
  - "B"
weight_list: [1.0, 2]   # one each
output_path: 'C'
rescale: no
memory: >
  300MB
seed: 0x1F
"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4, "num_hidden_layers": 2,
    "vocab_size": 11, "intermediate_size": 5, "tie_word_embeddings": True, "torch_dtype": "float32", "dtype": "float32",
    "rope_scaling": {"factor": 2.0, "dtype": "x"}, "text_config": {"tie_word_embeddings": True, "vocab_size": 11},
    "quantization_config": None, "auto_map": {"AutoConfig": "x--y"},
}  # fmt: skip


@pytest.fixture
def hostile(modelfuse: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hostile:
    """A command about something hostile: done or refused, at once, and nothing written but to ``C``."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> int:
        before = snapshot(tmp_path)
        with bounded(f"modelfuse {words[0]}"):
            said = modelfuse(*words)
        assert said.status in (0, 2), said.err
        assert "Traceback" not in said.err
        assert len(said.err) < 20_000
        if (tmp_path / "C").exists() and words[0] == "merge":
            shutil.rmtree(tmp_path / "C")
        assert snapshot(tmp_path) == before
        return said.status

    return run


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate(("A", "B", "base")):
        make_model(tmp_path / name, random_tensors(seed), files={"notes.txt": "x"})
    return tmp_path


# Recipes


@fuzz
@given(content=json_files(RECIPE))
def test_json_recipes(hostile: Hostile, models: Path, content: bytes) -> None:
    (models / "r.json").write_bytes(content)
    hostile("check", "r.json")


@fuzz
@given(content=st.one_of(texts(YAML), json_files(RECIPE)))
def test_yaml_recipes(hostile: Hostile, models: Path, content: bytes) -> None:
    (models / "r.yaml").write_bytes(content)
    hostile("check", "r.yaml")


def _levels(first: str, rest: str) -> str:
    """A short text that stands for 10⁸ values."""
    names = "abcdefghi"
    lines = [f"{name}: &{name} {rest % ','.join([f'*{last}'] * 10)}" for last, name in pairwise(names)]
    return "\n".join([f"a: &a {first}", *lines])


#: What was found, or is known to break others; and what is said of it.
CORPUS: dict[str, tuple[str | bytes, str]] = {
    "aliases of aliases": (_levels("[x, x]", "[%s]"), "aliases are not taken"),
    "merged maps": (_levels("{x: 1, y: 2}", "{<<: [%s]}"), "aliases are not taken"),
    "a list of itself": ("model_path_list: &a [*a]", "aliases are not taken"),
    "a call": ("seed: !!python/object/apply:os.system [ls]", "is not taken"),
    "a name": ("seed: !!python/name:os.system", "is not taken"),
    "a set, whose order is any": ("model_path_list: !!set {A, B}", "is not taken"),
    "bytes": ("output_path: !!binary YQ==", "is not taken"),
    "a number of bits": ("seed: 0x" + "f" * 100_000, "a number of too many digits"),
    "a number of minutes": ("seed: 1" + ":59" * 10_000, "a number of too many digits"),
    "a number of digits": ("seed: " + "9" * 5000, "malformed"),
    "a date": ("seed: 2020-01-01", "seed is '2020-01-01'"),
    "no date": ("output_path: 2020-13-45", "model_path_list is not given"),
    "deep lists": ("a: " + "[" * 5000, "nested too deeply"),
    "deep maps": ("{a: " * 5000, "nested too deeply"),
    "deep dashes": ("- " * 5000, "nested too deeply"),
    "twice": ("seed: 1\nseed: 2", "seed is given twice"),
    "twice within": ("weight_list: {a: 1, a: 2}", "a is given twice"),
    "a number as key": ("1: 2", "not a map of settings"),
    "a list as key": ("? [a]\n: b", "malformed"),
    "nothing": ("", "not a map of settings"),
    "two documents": ("a: 1\n---\nb: 2", "malformed"),
    "UTF-16": ("seed: 1".encode("utf-16"), "cannot be read"),
    "a byte of no text": (b"seed: \xff", "cannot be read"),
    "a zero byte": (b"seed: \0", "malformed"),
    "a path with a zero": ('output_path: "a\\0b"', "this is no path"),
    "half a character": ('output_path: "\\ud800"\nmodel_path_list: [A, B]', "this is no path"),
    "half a character to copy": ('copy_file_list: ["\\ud800"]\nmodel_path_list: [A, B]', "copy_file_list names"),
    "much": ("seed: 1\n" * 30_000, "it is no recipe"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CORPUS)
def test_the_corpus_of_yaml(hostile: Hostile, modelfuse: Run, models: Path, kind: str) -> None:
    content, says = CORPUS[kind]
    path = models / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert hostile("check", path) == 2
    assert says in modelfuse("check", path).err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"seed": 1, "seed": 2}', "seed is given twice"),
        ('{"a": ' + "[" * 900 + "]" * 900 + "}", "There is no setting"),
        ('{"model_path_list": ' + "[" * 900 + "]" * 900 + "}", "model_path_list is"),
        ('{"a": ' * 5000, "r.json is malformed: "),  # Python 3.14 reads as deep as the stack is.
        ('{"output_path": "\\ud800", "model_path_list": ["A", "B"]}', "this is no path"),
        ("{" + ",".join(f'"k{number}": 1' for number in range(10_000)) + "}", "There is no setting"),
    ],
)
def test_the_corpus_of_json(hostile: Hostile, modelfuse: Run, models: Path, content: str, says: str) -> None:
    (models / "r.json").write_text(content)
    assert hostile("check", "r.json") == 2
    assert says in modelfuse("check", "r.json").err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.json", json.dumps({"model_path_list": ["A"] * 60_000})),
        ("r.json", json.dumps({"model_path_list": [f"m/{number}" for number in range(9000)]})),
        ("r.json", json.dumps({"model_path_list": ["A", "B"], "weight_list": [1] * 60_000})),
        ("r.yaml", "model_path_list: [" + "A," * 60_000 + "]"),
        ("r.yaml", "model_path_list:\n" + "- A\n" * 40_000),
        ("r.yaml", "---\n" * 40_000),
        ("r.yaml", "merge_method: linear\nmodels:\n" + "- model: A\n" * 12_000),
        ("r.yaml", "a: {" + "b: " * 60_000 + "}"),
    ],
)
def test_what_is_refused_is_refused_soon(hostile: Hostile, models: Path, name: str, content: str) -> None:
    (models / name).write_text(content)
    started = time.process_time()
    assert hostile("check", name) == 2
    assert time.process_time() - started < 8, "with every allocation traced"


def test_what_is_taken(modelfuse: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mark in front, as editors on Windows write; dates as text; a pipe; a file without end."""
    monkeypatch.chdir(models)
    good = b"model_path_list: [A, B]\noutput_path: 2020-01-01\n"
    for name, content in (
        ("r.yaml", b"\xef\xbb\xbf" + good),
        ("r.json", b'\xef\xbb\xbf{"model_path_list": ["A", "B"]}'),
    ):
        (models / name).write_bytes(content)
        assert modelfuse("check", name).status == 0
    reading, writing = os.pipe()
    os.write(writing, good)
    os.close(writing)
    assert modelfuse("check", f"/dev/fd/{reading}").status == 0
    os.close(reading)
    assert "it is no recipe" in modelfuse("check", "/dev/zero").err


# What lies in a model's folder


@fuzz
@given(content=json_files(CONFIG))
def test_config(hostile: Hostile, models: Path, content: bytes) -> None:
    for name in ("A", "B"):
        (models / name / "config.json").write_bytes(content)
    hostile("merge", "--model_path_list", "A", "B", "--output_path", "C", "--output_dtype", "bfloat16", "--quiet")


def test_index(hostile: Hostile, tmp_path: Path) -> None:
    for seed, name in enumerate("AB"):
        make_model(tmp_path / name, random_tensors(seed), shards=2)
    path = tmp_path / "B" / "model.safetensors.index.json"

    @fuzz
    @given(content=json_files(json.loads(path.read_bytes())))
    def merge(content: bytes) -> None:
        path.write_bytes(content)
        hostile("merge", "--model_path_list", "A", "B", "--output_path", "C", "--quiet")

    merge()


def test_headers(hostile: Hostile, models: Path) -> None:
    path = models / "B" / "model.safetensors"
    good = path.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")

    @fuzz
    @given(header=json_files(json.loads(good[8:end])))
    def merge(header: bytes) -> None:
        path.write_bytes(len(header).to_bytes(8, "little") + header + good[end:])
        hostile("merge", "--model_path_list", "A", "B", "--output_path", "C", "--quiet")

    merge()


LONG = "x" * 5000


@pytest.mark.parametrize("command", ["check", "merge"])
def test_names_too_long_for_any_file(refuse: Callable[..., str], models: Path, command: str) -> None:
    words = ["--model_path_list", models / "A", models / "B", "--output_path"]
    refuse(command, *words, models / LONG, says=["File name too long"])
    refuse(command, *words, models / "C", "--copy_file_list", LONG, says=["which is not in"])
    refuse(command, "--model_path_list", models / LONG, models / "B", "--output_path", models / "C", says=["no folder"])
    index = models / "B" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": LONG}}))
    refuse(command, *words, models / "C", says=["is missing"])


def test_names_too_long_in_a_report(modelfuse: Run, merged: Path) -> None:
    report = json.loads((merged / "merge_report.json").read_text())
    for change in ({"inputs": [{"path": f"/{LONG}", "files": {}}]}, {"files": {LONG: 5}}, {"copied_files": [LONG]}):
        (merged / "merge_report.json").write_text(json.dumps({**report, **change}))
        assert modelfuse("verify", merged).status == 2


def test_links_that_lead_nowhere(refuse: Callable[..., str], models: Path) -> None:
    loop = models / "loop"
    loop.symlink_to(loop)
    refuse("merge", "--model_path_list", loop, models / "A", "--output_path", models / "C", says=[loop])
    refuse("merge", "--model_path_list", models / "B", models / "A", "--output_path", loop, says=[loop])
    (models / "A" / "loop").symlink_to("loop")
    (models / "A" / "gone").symlink_to("nothing")
    words = ["--model_path_list", models / "A", models / "B", "--output_path", models / "C"]
    refuse("merge", *words, "--copy_file_list", "loop", says=["copy_file_list names loop"])


def _a_pipe(path: Path) -> None:
    os.mkfifo(path)


def _a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def _a_link_to_nothing(path: Path) -> None:
    path.symlink_to("gone")


def _a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [_a_pipe, _a_socket, _a_link_to_nothing, _a_device, Path.mkdir])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "config.json", "tokenizer.model", "modules.json", "additional_chat_templates/x.jinja"]
)
def test_what_is_there_and_is_no_file_is_never_left_out(
    refuse: Callable[..., str], models: Path, name: str, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    path = models / "A" / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    make(path.relative_to(models))
    words = ["--model_path_list", "A", "B", "--output_path", "C"]
    refuse("check", *words, says=[path, "is not a regular file but a"])
    refuse("merge", *words, says=[path, "is not a regular file but a"])


@pytest.mark.parametrize("make", [_a_pipe, _a_link_to_nothing, Path.mkdir])
def test_weights_that_are_no_file_do_not_make_others_the_model(
    refuse: Callable[..., str], models: Path, make: Callable[[Path], None]
) -> None:
    """Beside older weights in another format, which nobody has asked for."""
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.ones(2)}, models / "A" / "pytorch_model.bin")
    path = models / "A" / "model.safetensors"
    path.unlink()
    make(path)
    refuse("check", "--model_path_list", models / "A", models / "B", says=[path])


@pytest.mark.parametrize("file", ["adapter_config", "lora_config"])
def test_settings_of_an_adapter_that_are_no_file(refuse: Callable[..., str], models: Path, file: str) -> None:
    """Without them, an adapter would be a model."""
    path = models / "A" / f"{file}.json"
    path.symlink_to("gone")
    refuse("check", "--model_path_list", models / "A", models / "B", says=[path, "which does not exist"])


def test_folders_of_training_are_no_files(merge: Run, models: Path) -> None:
    for name in ("checkpoint-500", "onnx", "runs", ".cache"):
        (models / "A" / name).mkdir()
    (models / "A" / "logs").symlink_to("runs")
    (models / "A" / ".hidden").symlink_to("gone")
    merge("--model_path_list", models / "A", models / "B", "--output_path", models / "C")


# What lies in an output


@pytest.fixture
def merged(merge: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(models)
    merge("--model_path_list", "A", "B", "--output_path", "out", "--max_shard_size", 200)
    return models / "out"


@pytest.mark.parametrize("name", ["merge_report.json", "merge_config.json", "model.safetensors.index.json"])
def test_outputs(hostile: Hostile, merged: Path, name: str) -> None:
    path = merged / name
    good = path.read_bytes()

    @fuzz
    @given(content=json_files(json.loads(good)))
    def verify(content: bytes) -> None:
        path.write_bytes(content)
        said = hostile("verify", merged, "--quiet", "--n_process", 1)
        assert said == 2 or content == good

    verify()


def test_a_pipe_in_an_output(hostile: Hostile, modelfuse: Run, merged: Path) -> None:
    """Opening one would wait for ever."""
    (merged / "config.json").unlink()
    os.mkfifo(merged / "config.json")
    assert "config.json is not a regular file" in modelfuse("verify", merged).err


# Adapters

PEFT = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 3.5, "use_rslora": True, "use_dora": False, "fan_in_fan_out": False,
    "bias": "none", "init_lora_weights": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.*up_proj": 5},
    "modules_to_save": None, "target_modules": ["q_proj", "up_proj"], "loftq_config": {}, "layer_replication": None,
}  # fmt: skip
PADDLE = {"r": 2, "lora_alpha": 3, "rslora": False, "trainable_bias": None, "pissa": False, "dtype": "float32"}


@fuzz
@given(content=st.one_of(json_files(PEFT), json_files(PADDLE)), file=st.sampled_from(["adapter_config", "lora_config"]))
def test_adapter_configs(hostile: Hostile, tmp_path: Path, content: bytes, file: str) -> None:
    base, _ = make_base(tmp_path / "base")
    down, up = factors(1, 16, 8)
    make_peft(tmp_path / "A", {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up})
    make_paddle(tmp_path / "P", {f"{Q}.lora_A": down.T.copy(), f"{Q}.lora_B": up.T.copy()})
    adapter = tmp_path / ("A" if file == "adapter_config" else "P")
    (adapter / f"{file}.json").write_bytes(content)
    hostile("check", "--lora_model_path", adapter, "--base_model_path", base)
    for each in ("base", "A", "P"):
        shutil.rmtree(tmp_path / each)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", ".*.*.*.*x", "(.*)*", "(aa|a)" * 40, "(" * 40 + "aa|a" + ")" * 40, r"\\*" * 12, ".*" * 200 + "x"],
)
def test_patterns_that_take_for_ever(hostile: Hostile, tmp_path: Path, pattern: str) -> None:
    """Python's own engine takes minutes for some of them."""
    base, _ = make_base(tmp_path / "base")
    down, up = factors(1, 16, 8)
    tensors = {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}
    make_peft(tmp_path / "A", tensors, rank_pattern={pattern: len(down)}, alpha_pattern={pattern: 3})
    words = ["--lora_model_path", tmp_path / "A", "--base_model_path", base, "--output_path", tmp_path / "C"]
    hostile("merge", *words, "--quiet")


@pytest.mark.parametrize("pattern", ["(", "(?=a)x", "a{1,9}{1,9}b*c*", "(?i)a", r"(a)\1"])
def test_patterns_that_are_none(refuse: Callable[..., str], tmp_path: Path, pattern: str) -> None:
    base, _ = make_base(tmp_path / "base")
    make_peft(tmp_path / "A", {}, rank_pattern={pattern: 2})
    words = ["--lora_model_path", tmp_path / "A", "--base_model_path", base, "--output_path", tmp_path / "C"]
    refuse("merge", *words, says=["rank_pattern", pattern.replace("\\", "\\\\")])


# Links


def test_links_out_of_a_folder_are_not_followed_unasked(refuse: Callable[..., str], merge: Run, models: Path) -> None:
    """A checkpoint of a stranger's must not say which of the user's files are published with the merge."""
    secret = models / "secret"
    secret.write_text("key")
    link = models / "A" / "vocab.txt"
    link.symlink_to(secret)
    words = ["--model_path_list", models / "A", models / "B", "--output_path", models / "C"]
    refuse("merge", *words, says=[link, secret, "outside"], hint="--copy_file_list vocab.txt")
    merge(*words, "--copy_file_list", "vocab.txt")
    assert (models / "C" / "vocab.txt").read_text() == "key"
    assert not (models / "C" / "vocab.txt").is_symlink()
    link.unlink()
    (models / "A" / "additional_chat_templates").symlink_to(models / "T")
    (models / "T").mkdir()
    (models / "T" / "x.jinja").write_text("key")
    refuse("merge", *words, "--overwrite", says=["x.jinja", "outside"])


def test_links_within_a_model_are_followed(merge: Run, models: Path) -> None:
    """Inside its folder, by a link to the folder itself, and as the hub's cache lies on the disk."""
    (models / "A" / "vocab.txt").symlink_to("notes.txt")
    hub = models / "models--x--y"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots").mkdir()
    (models / "A").rename(hub / "snapshots" / "0123")
    folder = hub / "snapshots" / "0123"
    for number, path in enumerate(sorted(folder.iterdir())):
        if not path.is_symlink():
            path.rename(hub / "blobs" / str(number))
            path.symlink_to(Path("../../blobs") / str(number))
    (models / "A").symlink_to(folder)
    merge("--model_path_list", models / "A", models / "B", "--output_path", models / "C")
    assert (models / "C" / "vocab.txt").read_text() == (models / "C" / "notes.txt").read_text() == "x"


def test_weights_behind_links_are_values_only(merge: Run, models: Path) -> None:
    outside = models / "elsewhere.safetensors"
    (models / "A" / "model.safetensors").rename(outside)
    (models / "A" / "model.safetensors").symlink_to(outside)
    merge("--model_path_list", models / "A", models / "B", "--output_path", models / "C")
