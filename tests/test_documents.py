"""What programs read: documents of ``--json``, environment variables, pages that are written from the code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Said
from jsonschema import Draft202012Validator

from modelfuse.cli.arguments import parse
from modelfuse.errors import RecipeError
from tools import generate

Run = Callable[..., Said]
Pair = tuple[Path, Path]


def document(said: Said, name: str) -> dict[str, Any]:
    """The one document on standard output, held to its schema."""
    read: dict[str, Any] = json.loads(said.out)
    schema = json.loads((ROOT / "docs" / "schemas" / f"{name}.json").read_text())
    Draft202012Validator(schema).validate(read)
    assert read["document"] == f"{name}/1"
    return read


def test_each_command_writes_one_document(modelfuse: Run, pair: Pair, tmp_path: Path) -> None:
    words = ("--model_path_list", *pair, "--output_path", tmp_path / "C", "--json")
    checked = document(modelfuse("check", *words, "--weight_list", "1,3"), "check")
    assert [each["weight"] for each in checked["inputs"]] == [1, 3]
    assert {each["action"] for each in checked["tensors"]} == {"merge"}
    merged = document(modelfuse("merge", *words), "merge")
    assert merged["merged"] == len(checked["tensors"]) == 5
    assert merged["output_path"] == str(tmp_path / "C")
    verified = document(modelfuse("verify", tmp_path / "C", "--json"), "verify")
    assert verified["holds"]
    methods = document(modelfuse("methods", "--json"), "methods")
    assert {"linear", "ties"} <= {each["merge_method"] for each in methods["merge_methods"]}
    (tmp_path / "C" / "config.json").write_text("{}")
    wrong = modelfuse("verify", tmp_path / "C", "--json")
    assert wrong.status == 2
    assert document(wrong, "verify")["problems"][0]["file"] == "config.json"


def test_errors_are_documents_too(modelfuse: Run, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["merge", "--json", "--reserve_q", "1"], ["check", "--json"], ["verify", "absent", "--json"]):
        said = modelfuse(*words)
        read = document(said, "error")
        assert read["status"] == said.status == 2
        assert f"error: {read['message']}" in said.err

    def broken(*_: object) -> None:
        raise ZeroDivisionError("injected")

    monkeypatch.setattr("modelfuse.planning.open_inputs.open_checkpoint", broken)
    said = modelfuse("check", "--json", "--model_path_list", *pair)
    read = document(said, "error")
    assert (read["kind"], read["status"], said.status) == ("ZeroDivisionError", 1, 1)


def test_the_environment_gives_what_is_the_machines(
    modelfuse: Run, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELFUSE_MEMORY", "300MB")
    monkeypatch.setenv("MODELFUSE_N_PROCESS", "")
    monkeypatch.setenv("MODELFUSE_SEED", "3")
    monkeypatch.setenv("MODELFUSE_LOG_FILE", str(tmp_path / "log"))
    assert parse([])[0] == {"memory": 300_000_000}
    (tmp_path / "r.json").write_text('{"memory": 5, "seed": 1}')
    assert parse([str(tmp_path / "r.json")])[0] == {"memory": 300_000_000, "seed": 1}
    assert parse([str(tmp_path / "r.json"), "--memory", "7"])[0]["memory"] == "7"
    assert modelfuse("check", "--model_path_list", *pair).status == 0
    assert " memory = 300000000" in (tmp_path / "log").read_text()
    monkeypatch.setenv("MODELFUSE_N_PROCESS", "x")
    with pytest.raises(RecipeError, match="variable MODELFUSE_N_PROCESS is 'x'"):
        parse([])
    assert modelfuse("verify", tmp_path).status == 2


@pytest.mark.parametrize("name", [name for name in generate.files() if not name.startswith("docs/reference")])
def test_files_are_those_that_the_code_gives(name: str) -> None:
    """Else run ``python tools/generate.py``."""
    assert (ROOT / name).read_text(encoding="utf-8") == generate.files()[name]
