"""The bench of quality: its questions and marks, and that its page says what was measured, of every method."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from modelfuse.methods.registry import COMBINATIONS, METHODS, SPARSIFIERS

sys.path.insert(0, str(ROOT / "benchmarks"))
from quality import report, sequences
from quality.evaluation import Answers, Known
from quality.merges import PLAIN, VARIANTS, Merged, Variant, judge_all, variants
from quality.regimes import MODELS, REGIMES
from quality.scores import scores


def answers(*losses: float) -> Answers:
    return Answers(np.array(losses), np.array([0.5] * len(losses)))


def test_a_share_of_gain() -> None:
    known = Known({"a": answers(4, 4), "b": answers(2, 2)}, {"a": answers(1, 1), "b": answers(1, 1)}, answers(3))
    assert known.shares({"a": answers(1, 1), "b": answers(2, 2)}) == {"a": 1, "b": 0}
    assert known.shares({"a": answers(2, 3), "b": answers(3, 3)}) == {"a": 0.5, "b": -1}
    assert known.accuracy({"a": answers(0), "b": answers(0)}) == 1


def test_marks_and_how_sure_they_are() -> None:
    """One that is better by as much on every row is surely so; one that is so on one row of many is not."""
    rows = 40
    draw = np.random.default_rng(0).normal(0, 0.1, rows)
    known = Known({"a": answers(*(4 + draw))}, {"a": answers(*(1 + draw))}, answers(2))

    def merged(*losses: float) -> Merged:
        own = {"a": answers(*losses)}
        return Merged((1.5, 0.6), own, own, answers(2.5))

    plain, better = 3 + draw, 2 + draw
    luck = plain - np.eye(rows)[0] * 8
    found = scores([known], [{PLAIN: merged(*plain), "better": merged(*better), "luck": merged(*luck)}])
    by_label = {each.label: each for each in found}
    assert [each.label for each in found] == ["better", "luck", PLAIN]
    assert by_label["better"].share == pytest.approx(2 / 3)
    assert by_label["better"].low > 0.3
    assert by_label["luck"].difference > 0 >= by_label["luck"].low
    assert (by_label[PLAIN].difference, by_label[PLAIN].low, by_label[PLAIN].high) == (0, 0, 0)
    assert by_label["better"].forgotten == pytest.approx(0.5)


def test_rows_follow_their_rules() -> None:
    rng = np.random.default_rng(0)
    for number, task in enumerate(sequences.TASKS):
        rows = sequences.rows(task, 20, rng)
        assert rows.shape == (20, sequences.WINDOW)
        symbols = rows[:, : sequences.LENGTH] - sequences.FIRST - number * sequences.SIZE
        assert symbols.min() >= 0
        assert symbols.max() < sequences.SIZE
        made = rows[:, sequences.LENGTH + 1 : -1] - sequences.FIRST - number * sequences.SIZE
        np.testing.assert_array_equal(made, sequences.RULES[task](symbols))
    assert sequences.general(50, rng).shape == (50, sequences.WINDOW)


def test_questions_to_choose_by_are_not_those_to_judge_by() -> None:
    for regime in REGIMES:
        for task in regime.experts[0]:
            known = {row.tobytes() for row in regime.validation[task].numbers}
            assert not known & {row.tobytes() for row in regime.test[task].numbers}


def test_the_models_are_small_and_all_there() -> None:
    assert sum(path.stat().st_size for path in MODELS.rglob("*")) < 4_500_000
    for regime in REGIMES:
        for each in (regime.base, *(path for experts in regime.experts for path in experts.values())):
            assert (
                each / ("adapter_config.json" if regime.adapters and each != regime.base else "config.json")
            ).is_file()


def test_every_method_has_its_marks_and_says_them() -> None:
    assert set(VARIANTS) <= METHODS.keys()
    labels = {each.label for each in variants()}
    assert labels >= METHODS.keys() - {"linear"}
    for own in report.saved().values():
        assert {each.label for each in own} == labels
    steps = [*(method.combination for method in METHODS.values()), *(each.sparsifier for each in METHODS.values())]
    assert [step.name for step in steps if step is not None and not step.measured] == []
    assert all(each.measured or each.name in ("largest", "random", "random_by_rank", "elect")
               for each in (*SPARSIFIERS.values(), *COMBINATIONS.values()))  # fmt: skip


def test_the_page_says_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, picture = tmp_path / "quality.md", tmp_path / "quality.svg"
    page.write_text(report.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    was = report.PICTURE.read_text(encoding="utf-8")
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "PICTURE", picture)
    report.write_pages()
    assert page.read_text(encoding="utf-8") == (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    assert picture.read_text(encoding="utf-8") == was


def test_a_merge_has_the_marks_that_were_saved() -> None:
    """By modelfuse's own merges: a method of whole matrices with λ chosen, and without."""
    hard = REGIMES[1]
    known, merged = judge_all(hard, 0, [Variant("ridge", "ridge")])
    saved = next(each for each in json.loads(report.RESULTS.read_text())["hard"] if each["label"] == "ridge")
    shares = known["test"].shares(merged["ridge"].tuned)
    assert np.mean([*shares.values()]) == pytest.approx(saved["by_seed"][0], abs=0.01)
