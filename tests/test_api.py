"""What programs and notebooks see: signatures, docstrings, short results, progress."""

from __future__ import annotations

import inspect
import io
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, make_model, random_tensors

import modelfuse as package
from modelfuse.api.keywords import Keywords
from modelfuse.api.signatures import argument
from modelfuse.cli.console import err
from modelfuse.recipe.names import SETTINGS

Pair = tuple[Path, Path]


@pytest.mark.parametrize("function", [package.merge, package.check])
def test_signatures_and_docstrings_have_every_setting(function: Any) -> None:
    parameters = inspect.signature(function).parameters
    assert [*map(argument, SETTINGS)] == [name for name in parameters if name not in ("progress", "html")]
    assert parameters["n_process"].default is None
    assert parameters["reserve_p"].default == 0.7
    assert parameters["model_path_list"].default is inspect.Parameter.empty
    assert {*map(argument, SETTINGS)} <= {*Keywords.__annotations__}
    text = inspect.getdoc(function) or ""
    assert all(f"    {name}: " in text for name in map(argument, SETTINGS))
    assert "Default: 0.7." in text
    assert "Raises:" in text


def test_words_of_python_are_settings_with_an_underscore(pair: Pair) -> None:
    plan = package.check(model_path_list=pair, base_model_path=pair[0], lambda_=0.5)
    assert plan.recipe.effective()["lambda"] == 0.5


def test_dir_shows_the_public_names_alone() -> None:
    assert dir(package) == sorted(package.__all__)
    assert not [name for name in package.__all__ if getattr(package, name) is None]


def test_misspelt_settings_are_a_type_error_for_checkers(tmp_path: Path) -> None:
    mypy = pytest.importorskip("mypy.api")
    (tmp_path / "use.py").write_text(
        "import modelfuse\n"
        "modelfuse.merge(model_path_list=['a', 'b'], output_path='c', reserve_p=0.5, progress=False)\n"
        "modelfuse.merge(model_path_list=['a', 'b'], reserve_q=0.5)\n"
        "modelfuse.check(model_path_list=['a', 'b'], weight_list='1,2')\n"
    )
    words = [sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir", str(ROOT / ".mypy_cache"), "use.py"]
    environment = {"PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT), "PATH": ""}
    said = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False).stdout
    assert mypy
    assert [line.split(":")[1] for line in said.splitlines() if ": error:" in line] == ["3", "4"], said


def test_results_are_short(tmp_path: Path) -> None:
    models = [make_model(tmp_path / name, random_tensors(1)) for name in ("A", "B")]
    plan = package.check(model_path_list=models, base_model_path=models[0], merge_method="ties")
    assert repr(plan) == "<Plan: ties of 2 models and a base: 5 tensors, reads 3.03 kB, writes 1.4 kB>" or (
        repr(plan).startswith("<Plan: ties of 2 models and a base: 5 tensors, reads ") and len(repr(plan)) < 100
    )
    html = plan._repr_html_()
    assert str(models[1]) in html
    assert "lm_head.weight" in html
    assert len(html) < 6000
    result = package.merge(model_path_list=models, base_model_path=models[0], output_path=tmp_path / "C")
    assert repr(result).startswith("<Result: merged ")
    assert repr(result).endswith(f"{tmp_path / 'C'}>")
    assert "equal the base" in result._repr_html_()
    found = package.verify(tmp_path / "C")
    assert repr(found).startswith("<Verification: holds; 5 tensors, 5 merged again; ")
    (tmp_path / "C" / "config.json").write_text("<b>")
    broken = package.verify(tmp_path / "C")
    assert "problems" in repr(broken) or "1 problem" in repr(broken)
    assert "config.json" in broken._repr_html_()


def test_names_are_no_html(tmp_path: Path) -> None:
    models = [make_model(tmp_path / f"<i>{name}", {"<b>x": random_tensors(1)["lm_head.weight"]}) for name in "AB"]
    html = package.check(model_path_list=models)._repr_html_()
    assert "<i>" not in html
    assert "<b>x" not in html
    assert "&lt;b&gt;x" in html


def test_programs_are_shown_nothing(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package.merge(model_path_list=pair, output_path=tmp_path / "C")
    assert capsys.readouterr() == ("", "")
    package.merge(model_path_list=pair, output_path=tmp_path / "D", merge_method="ties", progress=True)
    shown = capsys.readouterr().err
    assert shown.startswith("warning: trim without base_model_path")
    assert "merging 5 tensors" in shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_unless_it_is_unwanted(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: list[tuple[Any, bool]] = [(None, True), (True, True), (False, False), (print, False)]
    for number, (progress, shows) in enumerate(ways):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        vars(err).pop("console", None)
        package.merge(model_path_list=pair, output_path=tmp_path / str(number), progress=progress)
        vars(err).pop("console", None)
        assert ("merging" in terminal.getvalue()) == shows


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a simulated notebook shows."""
    shown: list[str] = []
    shell = type("ZMQInteractiveShell", (), {})()
    display = ModuleType("IPython.display")

    def show(what: str, display_id: bool) -> SimpleNamespace:
        shown.append(what)
        return SimpleNamespace(update=shown.append)

    vars(display).update(HTML=str, display=show)
    ipython = ModuleType("IPython")
    vars(ipython).update(get_ipython=lambda: shell, display=display)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr("modelfuse.cli.progress.NOTEBOOK_INTERVAL", 0.0)
    return shown


def test_a_notebook_shows_a_bar(pair: Pair, tmp_path: Path, notebook: list[str]) -> None:
    package.merge(model_path_list=pair, output_path=tmp_path / "C")
    assert notebook[0].startswith("merging")
    assert any("<progress value=" in each for each in notebook)
    assert notebook[-1].startswith("merging: 1.58 kB in ")
    notebook.clear()
    package.verify(tmp_path / "C")
    assert notebook[-1].startswith("verifying: ")
    notebook.clear()
    package.verify(tmp_path / "C", progress=False)
    assert not notebook
