"""Nothing that a stranger wrote reaches a terminal raw, and no secret of a URL is in any message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIG, Said, make_model, random_tensors
from hypothesis import given
from hypothesis import strategies as st

import modelfuse as package
from modelfuse.cli.console import TextStream
from modelfuse.printable import PrintableText, is_printable, one_line, printable

Run = Callable[..., Said]
#: What clears a screen, hides what was said, writes backwards, or begins a line of its own.
ATTACKS = [
    "a\x1b[2Jb",
    "a\rb",
    "a\x9b2Jb",
    "a\u202eb",
    "a\u2066b",
    "a\nerror: b",
    "a\x08b",
    "a\u2028b",
    "a\x00b",
    "a\tb",
]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def is_clean(text: str) -> bool:
    return CONTROL.search(text) is None and not any(line.startswith("error: b") for line in text.splitlines())


@given(st.text())
def test_nothing_but_ends_of_indented_lines_is_left(text: str) -> None:
    shown = printable(text)
    assert CONTROL.search(shown) is None
    assert all(line.startswith("  ") for line in shown.split("\n")[1:])
    assert printable(shown) == printable(str(shown)) == shown
    assert is_printable(one_line(text))
    assert "\n" not in PrintableText.of([text])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("GET https://me:pass@h.org/a?X-Amz-Signature=1#x failed", "GET https://h.org/a failed"),
        ("URL('http://t0ken@h.org:80/a b')", "URL('http://h.org:80/a b')"),
        ("redirect loop: http://h.org/?key=1, http://h.org/?key=2", "redirect loop: http://h.org/ http://h.org/"),
        ("s3://key:pass@bucket/what?#1.bin", "s3://bucket/what?#1.bin"),
        ("Authorization: Bearer abcdefghijkl and hf_abcdefghijklmnopqrstu", "Authorization: … and …"),
        ("abfss://box@account.dfs.core.windows.net/a?b", "abfss://box@account.dfs.core.windows.net/a?b"),
        ("nothing: a@b.c?d#e", "nothing: a@b.c?d#e"),
    ],
)
def test_secrets_are_taken_out(text: str, says: str) -> None:
    assert printable(text) == says
    assert str(package.CheckpointError(text)) == says
    try:
        raise package.HubError("x", text)
    except package.HubError as error:
        assert error.hint == says


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_word_is_shown_raw(attack: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a log and on a terminal, in lines, tables and the logs beside."""
    for forced in (False, True):
        if forced:
            monkeypatch.setenv("FORCE_COLOR", "1")
        stream, kept = TextStream("stdout"), list[str]()
        stream.logs = [lambda level, text, kept=kept: kept.append(text)]  # type: ignore[misc]
        stream.print("[bold]{}[/]", attack)
        stream.log("note", "{}", attack)
        stream.table(("one", "other"), [(attack, 1)])
        said = capsys.readouterr().out
        assert is_clean(re.sub(r"\x1b\[[0-9;]*m", "", said)), said
        assert is_clean(kept[0])
        assert one_line(attack) in re.sub(r"\x1b\[[0-9;]*m", "", said)


@pytest.mark.parametrize("attack", [*ATTACKS, "a\n  b"])
def test_names_in_a_checkpoint(modelfuse: Run, tmp_path: Path, attack: str) -> None:
    """Of tensors, of files beside them, in an index: refused, with the name escaped."""
    tensors = {attack: np.ones(2, np.float32)}
    models = [make_model(tmp_path / name, tensors) for name in "AB"]
    said = modelfuse("check", "--model_path_list", *models)
    assert said.status == 2
    assert is_clean(said.err)
    assert "control characters" in said.err
    pair = [make_model(tmp_path / name, random_tensors(1)) for name in "CD"]
    if "\0" not in attack:
        (pair[0] / attack).write_text("x")
        said = modelfuse("check", "--model_path_list", *pair)
        assert said.status == 2
        assert is_clean(said.err)
        (pair[0] / attack).unlink()
    (pair[0] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": attack}}))
    said = modelfuse("check", "--model_path_list", *pair)
    assert said.status == 2
    assert is_clean(said.err)


@pytest.mark.parametrize("attack", ATTACKS)
def test_values_in_a_configuration(modelfuse: Run, tmp_path: Path, attack: str) -> None:
    for key in ("model_type", "architectures", "torch_dtype", "quantization_config", "hidden_size"):
        for value in (attack, [attack], {attack: attack}, {"quant_method": attack}):
            models = [make_model(tmp_path / name, random_tensors(1), config={**CONFIG, key: value}) for name in "AB"]
            said = modelfuse("check", "--model_path_list", *models)
            assert said.status in (0, 2)
            assert is_clean(said.err + said.out)


@pytest.mark.parametrize("attack", ATTACKS)
def test_documents(modelfuse: Run, tmp_path: Path, attack: str) -> None:
    """JSON says the same in escapes, which its readers undo."""
    if "\0" in attack:
        return
    models = [make_model(tmp_path / f"{attack} {name}", random_tensors(1)) for name in "AB"]
    said = modelfuse("check", "--json", "--model_path_list", *models)
    assert said.status == 0, said.err
    assert is_clean(said.out)
    assert json.loads(said.out)["inputs"][0]["path"] == str(models[0])


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_edited_report(modelfuse: Run, merge: Run, pair: tuple[Path, Path], tmp_path: Path, attack: str) -> None:
    merge("--model_path_list", *pair, "--output_path", tmp_path / "C")
    path = tmp_path / "C" / "merge_report.json"
    good = json.loads(path.read_text())
    first, entry = next(iter(good["tensors"].items()))
    for change in (
        {"tensors": {attack: entry, first: entry}}, {"tensors": {first: {**entry, "checksum": attack}}},
        {"files": {attack: 1}},
        {"inputs": [{"path": attack, "files": {attack: {"size": 1, "modified_ns": 1}}}]}, {"checksum": attack},
        {"method": {**good["method"], "merge_type": attack}}, {"sha256": {"config.json": attack}},
    ):  # fmt: skip
        path.write_text(json.dumps({**good, **change}))
        said = modelfuse("verify", tmp_path / "C")
        assert said.status == 2
        assert is_clean(said.err + said.out), said.err


def test_bugs_are_told_without_secrets(
    modelfuse: Run, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("https://me:pass@h.org/a?signature=1 \x1b[2J")

    monkeypatch.setattr("modelfuse.planning.plan.open_inputs", fail)
    said = modelfuse("check", "--model_path_list", *pair)
    assert said.status == 1
    assert "https://h.org/a \\x1b[2J" in said.err
    assert "signature" not in said.err


def test_verify_asks_nobody_whom_only_a_file_names(
    modelfuse: Run, merge: Run, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for inputs nor for a tokenizer."""
    merge("--model_path_list", *pair, "--output_path", tmp_path / "C")
    path = tmp_path / "C" / "merge_config.json"
    good = json.loads(path.read_text())

    def ask(url: object) -> None:
        raise AssertionError(f"{url} is asked")

    monkeypatch.setattr("modelfuse.storage.remote.open_store.store_of", ask)
    for change in ({"tokenizer_from": "https://h.org/a"}, {"model_path_list": ["s3://bucket/a", str(pair[1])]}):
        path.write_text(json.dumps({**good, **change}))
        said = modelfuse("verify", tmp_path / "C")
        assert said.status == 2
        assert "asked" not in said.err
