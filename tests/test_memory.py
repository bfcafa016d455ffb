"""The memory budget holds: real merges of awkward models, whose resident memory is sampled from outside."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("psutil", reason="needs psutil, which tells the resident memory of a process and its children")
sys.path.insert(0, str(ROOT / "benchmarks"))
from budgets import BUDGET, CASES, MB, TOLERANCE, Case, build, one, run

import modelfuse
from modelfuse.cli.arguments import parse
from modelfuse.kernels.adaptive import rehearse
from modelfuse.planning.memory_budget import GRAIN
from modelfuse.planning.plan import make_plan
from modelfuse.recipe.recipe import Recipe


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.small])
def test_the_budget_holds(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    assert case.small
    if case.transposed:
        pytest.importorskip("torch", reason="needs torch, which stores transposed tensors")
    planned, sample = run(case, case.small, tmp_path)
    assert sample.peak_bytes <= BUDGET * TOLERANCE
    # Far more than is taken would have fewer workers than there is memory for.
    assert sample.peak_bytes <= planned <= 2.5 * sample.peak_bytes


@pytest.mark.parametrize("name", ["one tensor", "any float32, della", "fifty models"])
def test_the_forecast_is_near_once_kernels_are_compiled(tmp_path: Path, name: str) -> None:
    """A first merge of a kind takes more; were that expected of all, the budget would allow fewer workers."""
    case = CASES[name]
    assert case.small
    words = build(case, 1, tmp_path / "tiny")
    rehearse(make_plan(Recipe.parse(parse(words)[0])).tensors[0].work)
    planned, sample = run(case, case.small, tmp_path)
    assert sample.peak_bytes <= planned <= 1.5 * sample.peak_bytes


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    """Fewer workers first; where the smallest slice of one is too much, the plan says so before any work."""
    case = Case(51, one("F64"), 2, 2, base="F64")
    words = build(case, 2, tmp_path)
    paths = words[words.index("--model_path_list") + 1 : words.index("--base_model_path")]
    plan = modelfuse.check(model_path_list=paths, base_model_path=words[-1], n_process=8, memory=200 * MB)
    assert (plan.workers, plan.slice_elements) == (1, GRAIN)
    assert any("1 of 8 workers" in note for note in plan.notes)
    little = modelfuse.check(model_path_list=paths, base_model_path=words[-1], n_process=8, memory=BUDGET // 2)
    assert little.memory > BUDGET // 2
    assert any("one worker needs that" in note for note in little.notes)
    roomy = modelfuse.check(model_path_list=paths, base_model_path=words[-1], n_process=8, memory=10 * BUDGET)
    assert roomy.workers == 8
    assert not any("one worker" in note or "workers" in note for note in roomy.notes)
