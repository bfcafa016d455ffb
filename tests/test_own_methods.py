"""Methods that are not modelfuse's own: registered by a program, and declared by a package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, array, make_model, random_tensors, read_model

import modelfuse as package

#: The program of docs/adding_a_method.md, without its merge.
DECLARATION = (
    (ROOT / "docs" / "adding_a_method.md")
    .read_text(encoding="utf-8")
    .split("```python\n")[1]
    .split("modelfuse.merge")[0]
)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [make_model(tmp_path / name, random_tensors(seed)) for seed, name in enumerate(("base", "A", "B"))]


def run(folder: Path, *words: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path or folder}"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def expected(models: list[Path], floor: float) -> dict[str, np.ndarray]:
    base, *others = ({name: array(each) for name, each in read_model(path).items()} for path in models)
    merged = {}
    for name, start in base.items():
        changes = [other[name] - start for other in others]
        kept = [np.where(abs(change) >= np.float32(floor), change, np.float32(0)) for change in changes]
        merged[name] = start + (kept[0] * np.float32(0.5) + kept[1] * np.float32(0.5))
    return merged


def test_a_program_registers_a_method(models: list[Path], tmp_path: Path) -> None:
    program = f"""{DECLARATION}
import inspect
settings = dict(merge_method="deadzone", floor=0.5, base_model_path="base", model_path_list=["A", "B"])
assert "floor" in inspect.signature(modelfuse.merge).parameters
assert "deadzone: smaller changes" in modelfuse.merge.__doc__
print(modelfuse.merge(**settings, output_path="out"))
print(modelfuse.verify("out"))
for wrong in (dict(settings, floor=-1), dict(settings, base_model_path=None), dict(settings, merge_method="deadzon")):
    try:
        modelfuse.merge(**wrong, output_path="other")
    except modelfuse.RecipeError as error:
        print("refused:", error.message)
try:
    modelfuse.register(Method("ties", LINEAR, DEADZONE))
except modelfuse.RecipeError as error:
    print("refused:", error.message)
"""
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    done = run(tmp_path, "program.py")
    assert done.returncode == 0, done.stderr
    assert "<Verification: holds" in done.stdout
    assert done.stdout.count("refused:") == 4
    for name, values in expected(models, 0.5).items():
        np.testing.assert_array_equal(array(read_model(tmp_path / "out")[name]), values)


def installed(folder: Path, declaration: str) -> Path:
    """A package with an entry point, as pip leaves it."""
    site = folder / "site"
    (site / "zone_merging-1.0.dist-info").mkdir(parents=True)
    (site / "zone_merging.py").write_text(declaration, encoding="utf-8")
    (site / "zone_merging-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: zone-merging\nVersion: 1.0\n"
    )
    (site / "zone_merging-1.0.dist-info" / "entry_points.txt").write_text(
        "[modelfuse.methods]\ndeadzone = zone_merging:METHODS\n"
    )
    return site


def test_a_package_declares_a_method(models: list[Path], tmp_path: Path) -> None:
    declaration = DECLARATION.replace("modelfuse.register(", "METHODS = [").replace(
        'base="required"))', 'base="required")]'
    )
    site = installed(tmp_path, declaration)
    words = ("-m", "modelfuse", "merge", "--merge_method", "deadzone", "--floor", "0.5", "--base_model_path", "base")
    done = run(tmp_path, *words, "--model_path_list", "A", "B", "--output_path", "out", path=site)
    assert done.returncode == 0, done.stderr
    for name, values in expected(models, 0.5).items():
        np.testing.assert_array_equal(array(read_model(tmp_path / "out")[name]), values)
    assert run(tmp_path, "-m", "modelfuse", "verify", "out", path=site).returncode == 0
    assert "floor = 0.001" in run(tmp_path, "-m", "modelfuse", "methods", path=site).stdout
    without = run(tmp_path, *words, "--model_path_list", "A", "B", "--output_path", "other")
    assert without.returncode == 2
    assert "floor" in without.stderr
    assert "Traceback" not in without.stderr


def test_a_package_that_is_broken_is_named(models: list[Path], tmp_path: Path) -> None:
    site = installed(tmp_path, "raise ZeroDivisionError('injected')")
    words = ("merge", "--merge_method", "deadzone", "--model_path_list", *models, "--output_path", "out")
    done = run(tmp_path, "-m", "modelfuse", *words, path=site)
    assert done.returncode == 2
    assert "The method deadzone of zone-merging cannot be loaded: ZeroDivisionError: injected" in done.stderr
    assert run(tmp_path, "-m", "modelfuse", "check", "--model_path_list", *models, path=site).returncode == 0


def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(package.RecipeError, match="is no method"):
        package.register(3)  # type: ignore[arg-type]


def test_the_other_declaration_of_the_page(models: list[Path], tmp_path: Path) -> None:
    """Weights that are a function of the Gram matrix: each tensor is that of the nearest model."""
    page = (ROOT / "docs" / "adding_a_method.md").read_text(encoding="utf-8")
    program = DECLARATION + page.split("```python\n")[2].split("```")[0]
    base, *others = map(str, models)
    program += (
        f"modelfuse.merge(merge_method='shortest', base_model_path={base!r}, model_path_list={others!r}, "
        "output_path='out', progress=False)\n"
    )
    done = run(tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    start, *inputs = ({name: array(each) for name, each in read_model(path).items()} for path in models)
    for name, stored in read_model(tmp_path / "out").items():
        changes = [(each[name] - start[name]).astype(np.float64) for each in inputs]
        nearest = inputs[int(np.argmin([np.sum(change * change) for change in changes]))][name]
        np.testing.assert_allclose(array(stored), nearest, atol=1e-6)
