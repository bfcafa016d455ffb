"""The project around the package: the site, the distributions, the examples."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Said
from test_first_minute import commands_of

import modelfuse as package
from modelfuse.cli.setting_groups import FROM_ENVIRONMENT

Run = Callable[..., Said]


def run(*words: object, **options: Any) -> str:
    """What a program of this Python says."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, *map(str, words)]
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    assert "WARNING" not in run("-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site", cwd=ROOT)
    page = (tmp_path / "site" / "reference" / "settings" / "index.html").read_text(encoding="utf-8")
    assert "reserve_p" in page
    assert (tmp_path / "site" / "examples" / "Dockerfile").is_file()


@pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="build is not installed")
def test_distributions_are_slim_and_described(tmp_path: Path) -> None:
    run("-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT)
    (source,) = tmp_path.glob("*.tar.gz")
    (wheel,) = tmp_path.glob("*.whl")
    assert source.stat().st_size < 1_500_000
    with tarfile.open(source) as archive:
        tops = {name.split("/")[1] for name in archive.getnames()}
    assert "modelfuse" in tops
    assert not tops & {"demo", "tests", "benchmarks"}
    assert "PASSED" in run("-m", "twine", "check", "--strict", source, wheel)


@pytest.mark.filterwarnings("ignore")
def test_the_example_in_python_works(modelfuse: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    modelfuse("demo", "-q")
    said = run(ROOT / "examples" / "merge.py", cwd=tmp_path)
    assert "<Plan: ties of 3 models and a base" in said
    assert "<Verification: holds" in said


def test_the_notebook_works(modelfuse: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells, one after the other, without the programs of a notebook."""
    monkeypatch.chdir(tmp_path)
    modelfuse("demo", "-q")
    notebook = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "notebook", "exec"), names)
    assert names["result"].merged == 38
    assert package.verify("models/linear-1.0").holds


def test_the_tutorials_commands_work(modelfuse: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands_of((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")):
        done = modelfuse(*shlex.split(command)[1:])
        assert done.status == 0, (command, done.err)


def test_the_commands_of_the_workflow_work(modelfuse: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    modelfuse("demo", "-q")
    text = (ROOT / "examples" / "Snakefile").read_text(encoding="utf-8")
    (common,) = re.findall(r'common="(.+)"', text)
    common = common.replace("{wildcards.weight}", "0.5")
    filled = {"$common": common, "{output.folder}": "out", "{threads}": "2", "{input}": "out"}
    for line in re.findall(r"(?:modelfuse [^\n\"]+)", text):
        for name, value in filled.items():
            line = line.replace(name, value)
        done = modelfuse(*shlex.split(line.partition(" > ")[0])[1:])
        assert done.status == 0, (line, done.err)


def test_the_other_examples_name_what_there_is() -> None:
    dockerfile = (ROOT / "examples" / "Dockerfile").read_text(encoding="utf-8")
    for name in re.findall(r"MODELFUSE_(\w+)", dockerfile):
        assert name.lower() in FROM_ENVIRONMENT
    steps = yaml.safe_load((ROOT / "examples" / "ci.yml").read_text(encoding="utf-8"))["jobs"]["check"]["steps"]
    assert any("modelfuse check" in step.get("run", "") for step in steps)
    listed = re.findall(r"\]\(([\w.]+)\)", (ROOT / "examples" / "README.md").read_text(encoding="utf-8"))
    assert {*listed, "README.md"} == {path.name for path in (ROOT / "examples").iterdir() if path.is_file()}


def test_the_page_of_the_report_has_its_fields(modelfuse: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    modelfuse("demo", "-q")
    modelfuse("merge", "models/recipe.yaml", "-q")
    report = json.loads(Path("models/merged-by-recipe/merge_report.json").read_text())
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    fields = {*report, *next(iter(report["tensors"].values())), *report["inputs"][0], *report["method"]}
    assert not {name for name in fields if f"`{name}`" not in page and f".{name}`" not in page}
    source = (ROOT / "modelfuse" / "execution" / "report_writer.py").read_text(encoding="utf-8")
    for name in re.findall(r"^\| `([\w.\[\]*]+)`", page, re.MULTILINE):
        last = re.split(r"[.\]*]+", name)[-1]
        assert f'"{last}"' in source or last in ("report_sha256", "relative_error"), name
