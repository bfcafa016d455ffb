"""The first minute: models to try things on, and every command of the README that can be tried on them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, Said, snapshot

from modelfuse import errors

Run = Callable[..., Said]


def commands_of(text: str) -> list[str]:
    """The commands in a page's blocks, lines that end in a backslash joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.startswith("  ") and line.strip().startswith("modelfuse ")]


def test_the_demos_commands_work(modelfuse: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = modelfuse("demo")
    assert said.status == 0, said.err
    assert all(len(line) <= 80 for line in said.out.splitlines())
    commands = commands_of(said.out)
    assert len(commands) == 5
    for command in commands:
        done = modelfuse(*shlex.split(command)[1:])
        assert done.status == 0, done.err
    again = modelfuse("demo")
    assert (again.status, again.out) == (2, "")
    assert "exists and is not empty" in again.err


def test_the_demos_models_are_the_same_every_time(
    modelfuse: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "AB":
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert modelfuse("demo", "-q").out == ""
    assert snapshot(tmp_path / "A") == snapshot(tmp_path / "B")


@pytest.mark.filterwarnings("ignore")  # Of those libraries about each other.
def test_transformers_and_peft_take_the_demos_models(
    modelfuse: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    modelfuse("demo", "-q")
    modelfuse("merge", "models/recipe.yaml", "-q")
    model = transformers.AutoModelForCausalLM.from_pretrained("models/merged-by-recipe")
    tokenizer = transformers.AutoTokenizer.from_pretrained("models/merged-by-recipe")
    assert tokenizer.decode(tokenizer("Grüße")["input_ids"]) == "Grüße"
    assert model.config.vocab_size == 257
    adapted = peft.PeftModel.from_pretrained(model, "models/lora")
    assert adapted.peft_config["default"].r == 8


def test_the_readmes_commands_work_in_order(modelfuse: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those on the demo's models; others name what is not here."""
    monkeypatch.chdir(tmp_path)
    commands = commands_of((ROOT / "README.md").read_text(encoding="utf-8"))
    tried = [command for command in commands if " models/" in command or command.startswith("modelfuse demo")]
    assert len(tried) >= 5
    for command in tried:
        done = modelfuse(*shlex.split(command, comments=True)[1:])
        assert done.status == 0, (command, done.err)


def test_a_missing_extra_is_named_as_it_can_be_installed_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hint = "pip install 'modelfuse[hub]'"
    assert errors.MissingExtraError("m", hint).hint == f"pip install '{ROOT}[hub]'"
    installed = tmp_path / "site" / "modelfuse" / "errors.py"
    monkeypatch.setattr(errors, "__file__", str(installed))
    direct = {"url": f"file://{tmp_path}/a%20clone", "dir_info": {}}
    monkeypatch.setattr(
        "importlib.metadata.distribution", lambda _: SimpleNamespace(read_text=lambda _: json.dumps(direct))
    )
    assert errors.MissingExtraError("m", hint).hint == hint
    (tmp_path / "a clone").mkdir()
    (tmp_path / "a clone" / "pyproject.toml").touch()
    assert errors.MissingExtraError("m", hint).hint == f"pip install '{tmp_path}/a clone[hub]'"
    monkeypatch.setattr("importlib.metadata.distribution", lambda _: SimpleNamespace(read_text=lambda _: None))
    assert errors.MissingExtraError("m", hint).hint == hint
