"""A stranger's folder, recipe and adapter: done or refused, at once, and nothing of this machine gives way.

The documents in them are fuzzed one by one in test_fuzz.py; here a folder holds anything, and all of a merge is run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from adapting import Q, factors, make_base, make_peft
from conftest import CONFIG, Said, make_model, random_tensors, snapshot
from hostile import EFFORT, PIECES, VALUES, bounded, json_files, texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Run = Callable[..., Said]
Hostile = Callable[..., int]
fuzz = settings(max_examples=25 * EFFORT, deadline=None, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
SECRET = "the key of this machine's user"
#: What is looked for in a model's folder, what is copied, and what nobody has heard of.
NAMES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "modules.json", "README.md",
    "chat_template.jinja", "vocab.txt", "merge_report.json", "merge_config.json", "model.safetensors.index.json",
    "model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "model_state.pdparams",
    "adapter_config.json", "lora_config.json", "adapter_model.safetensors", "additional_chat_templates", "1_Pooling",
    "special_tokens_map.json", ".hidden", "code.py", "a\x1b[2Jb", "a\nb", "é", " ", "-x", "x" * 200,
]  # fmt: skip
LINKS = ["../secret", "/dev/zero", "gone", "self", "..", ".", "/", "config.json"]
words = st.sampled_from([value for value in VALUES if isinstance(value, str) and "\0" not in value])
contents = st.one_of(
    st.sampled_from(PIECES),
    json_files(CONFIG),
    json_files({"weight_map": {"model.norm.weight": "model.safetensors", "x": "../A/model.safetensors"}}),
    json_files([{"path": "1_Pooling", "type": "x"}, {"path": "../B"}, {"path": ""}]),
    texts(b'{"bos_token": "<s>", "added_tokens": [{"content": "x", "id": 1}], "model": {"vocab": {"a": 0}}}'),
)
#: How an entry comes to a folder.
entries = st.one_of(
    st.tuples(st.just("file"), contents),
    st.tuples(st.just("folder"), st.sampled_from(["config.json", "model.safetensors", "x.jinja", "vocab.txt"])),
    st.tuples(st.just("pipe"), st.none()),
    st.tuples(st.just("link"), st.sampled_from(LINKS)),
)


@pytest.fixture
def hostile(modelfuse: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hostile:
    """A merge into ``C``; nothing else is written, and nothing of the user's comes into it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text(SECRET)

    def run(*words: object) -> int:
        before = snapshot(tmp_path)
        with bounded(f"modelfuse {words[0]}"):
            said = modelfuse(*words, "--n_process", 2)
        assert said.status in (0, 2), said.err
        assert "Traceback" not in said.err
        assert SECRET not in said.err + said.out
        assert len(said.err) < 20_000
        out = tmp_path / "C"
        if out.exists():
            assert said.status == 0
            assert all(SECRET.encode() not in each for each in snapshot(out).values() if isinstance(each, bytes))
            shutil.rmtree(out)
        assert snapshot(tmp_path) == before
        return said.status

    return run


def put(folder: Path, name: str, kind: str, what: object) -> None:
    path = folder / name
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "file":
        path.write_bytes(bytes(what))  # type: ignore[call-overload]
    elif kind == "folder":
        path.mkdir()
        (path / str(what)).write_text("{}")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(name if what == "self" else str(what))


@fuzz
@given(st.lists(st.tuples(st.sampled_from(NAMES), entries), min_size=1, max_size=4))
def test_a_folder(hostile: Hostile, tmp_path: Path, made: list[tuple[str, tuple[str, object]]]) -> None:
    for name in "AB":
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        make_model(tmp_path / name, random_tensors(1 if name == "A" else 2), files={"vocab.txt": "x"})
    for name, (kind, what) in made:
        put(tmp_path / "A", name, kind, what)
    hostile("merge", "--model_path_list", "A", "B", "--output_path", "C", "--quiet")


ARCEE = b"""# as arcee's tool has it
merge_method: dare_ties
base_model: A
models:
  - model: A
  - model: B
    parameters:
      weight: [{filter: mlp, value: 0.9}, {value: 0.1}]
      density: 0.5
parameters:
  normalize: true
dtype: float32

"""
OURS = {
    "model_path_list": ["A", "B"], "merge_method": "dare_ties", "base_model_path": "A", "weight_list": [1, 0.5],
    "reserve_p": 0.5, "seed": 3, "max_shard_size": "1kB", "output_dtype": "float32", "copy_file_list": ["vocab.txt"],
    "tokenizer_from": "B", "unmerged_from": "A", "hub_endpoint": None, "memory": "300MB",
    "rules": [{"tensors": "*mlp*", "take": "B"}, {"tensors": "model.norm.*", "reserve_p": 0.9}],
}  # fmt: skip


@fuzz
@given(content=st.one_of(json_files(OURS), texts(ARCEE)), form=st.sampled_from(["json", "yaml"]))
def test_a_recipe(hostile: Hostile, tmp_path: Path, content: bytes, form: str) -> None:
    """Where to write is the user's own word."""
    if not (tmp_path / "A").exists():
        for seed, name in enumerate("AB"):
            make_model(tmp_path / name, random_tensors(seed), files={"vocab.txt": "x"})
    (tmp_path / f"r.{form}").write_bytes(content)
    hostile("merge", f"r.{form}", "--output_path", "C", "--quiet")
    (tmp_path / f"r.{form}").unlink()


ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 3.5, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {".*q_proj": 5}, "bias": "none", "base_model_name_or_path": "../secret",
}  # fmt: skip
HEADER = {
    f"base_model.model.{Q}.lora_A.weight": {"dtype": "F32", "shape": [2, 16], "data_offsets": [0, 128]},
    f"base_model.model.{Q}.lora_B.weight": {"dtype": "F32", "shape": [8, 2], "data_offsets": [128, 192]},
    "__metadata__": {"format": "pt"},
}


@fuzz
@given(
    config=st.one_of(st.none(), json_files(ADAPTER)), header=st.one_of(st.none(), json_files(HEADER)),
    rename=st.one_of(st.none(), words), more=st.lists(st.tuples(st.sampled_from(NAMES), entries), max_size=2),
)  # fmt: skip
def test_an_adapter(
    hostile: Hostile, tmp_path: Path, config: bytes | None, header: bytes | None, rename: str | None,
    more: list[tuple[str, tuple[str, object]]],
) -> None:  # fmt: skip
    for name in ("base", "L"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    make_base(tmp_path / "base")
    down, up = factors(1, 16, 8)
    make_peft(tmp_path / "L", {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up})
    if rename is not None:
        changed = {rename if "lora_A" in name else name: value for name, value in HEADER.items()}
        header = header or json.dumps(changed).encode()
    if header is not None:
        (tmp_path / "L" / "adapter_model.safetensors").write_bytes(
            len(header).to_bytes(8, "little") + header + bytes(192)
        )
    if config is not None:
        (tmp_path / "L" / "adapter_config.json").write_bytes(config)
    for name, (kind, what) in more:
        put(tmp_path / "L", name, kind, what)
    hostile("merge", "--lora_model_path", "L", "--base_model_path", "base", "--output_path", "C", "--quiet")
