"""What a merge kept of its inputs: every number against plain float64 definitions over whole tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import needs_browser, use
from conftest import CONFIG, Said, array, bf16, make_model, read_model
from test_documents import document

import modelfuse as package
from modelfuse.checkpoints import open_checkpoint
from modelfuse.cli.demo import make_models
from modelfuse.errors import CheckpointError
from modelfuse.inspection.merge_outcome import Outcome
from modelfuse.inspection.merge_report import MergeReport, compare_output, report_output
from modelfuse.planning.diff_sample import BLOCK, SampledTensor
from modelfuse.recipe.recipe import Recipe

Run = Callable[..., Said]
SHAPES = {"model.embed_tokens.weight": (40, 16), "model.layers.0.mlp.up_proj.weight": (24, 16),
          "model.layers.1.mlp.up_proj.weight": (24, 16), "model.norm.weight": (16,)}  # fmt: skip
METHODS: list[dict[str, Any]] = [
    {"merge_method": "linear"},
    {"merge_method": "ties", "weight_list": [1, 0.5, 1], "reserve_p": 0.4},
    {"merge_method": "dare_linear", "reserve_p": 0.5},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes of it; one leaves a tensor as it is."""
    folder, random = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    base = {name: random.standard_normal(shape) for name, shape in SHAPES.items()}
    make_model(folder / "base", {name: bf16(each) for name, each in base.items()}, config=CONFIG)
    for number, model in enumerate("abc"):
        tuned = {
            name: each
            + (
                0.1 * (number + 1) * random.standard_normal(each.shape)
                if (model, name[-11:]) != ("b", "norm.weight")
                else 0
            )
            for name, each in base.items()
        }
        make_model(folder / model, {name: bf16(each) for name, each in tuned.items()}, config=CONFIG)
    return folder


def merged(models: Path, out: Path, **settings: Any) -> MergeReport:
    package.merge(model_path_list=[models / "a", models / "b", models / "c"], base_model_path=models / "base",
                  output_path=out, progress=False, **settings)  # fmt: skip
    return report_output(out)


def values(folder: Path) -> dict[str, np.ndarray]:
    return {name: array(each).astype(np.float64).ravel() for name, each in read_model(folder).items()}


def same(found: float | None, expected: float | None) -> None:
    assert (found is None) == (expected is None)
    assert found is None or found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def check(outcome: Outcome, tuned: list[np.ndarray], base: np.ndarray, output: np.ndarray) -> None:
    """Hold an outcome against its definitions; differences are taken in float32, as merges do."""
    taus = [(each.astype(np.float32) - base.astype(np.float32)).astype(np.float64) for each in tuned]
    delta = (output.astype(np.float32) - base.astype(np.float32)).astype(np.float64)
    moving = [each for each in taus if each.any()]
    matrix = np.stack(moving, axis=1)
    coefficients = np.linalg.lstsq(matrix, delta, rcond=None)[0]
    same(outcome.relative, float(np.linalg.norm(delta) / np.linalg.norm(base)))
    same(outcome.residual, float(np.linalg.norm(delta - matrix @ coefficients) / np.linalg.norm(delta)))
    parts = matrix * coefficients
    cancelled = 1 - np.sum(parts.sum(axis=1) ** 2) / np.sum(parts**2)
    same(outcome.cancelled, max(0.0, float(cancelled)))
    own = iter(coefficients)
    for found, tau in zip(outcome.models, taus, strict=True):
        if not tau.any():
            assert (found.projection, found.coefficient, found.dropped) == (None, 0.0, None)
            continue
        changed, both = tau != 0, (tau != 0) & (delta != 0)
        same(found.projection, float(delta @ tau / (tau @ tau)))
        same(found.coefficient, float(next(own)))
        same(found.dropped, float(np.mean(delta[changed] == 0)))
        same(found.reversed, float(np.mean((tau * delta)[both] < 0)))
        cosine = float(delta @ tau / np.linalg.norm(delta) / np.linalg.norm(tau))
        same(found.left, (1 - cosine**2) ** 0.5)


@pytest.mark.parametrize("settings", METHODS, ids=lambda each: str(each["merge_method"]))
def test_every_number_is_as_it_is_defined(models: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    report = merged(models, tmp_path / "out", **settings)
    inputs = [values(models / name) for name in "abc"]
    base, output = values(models / "base"), values(tmp_path / "out")
    assert {each.name for each in report.tensors} == set(SHAPES)
    for each in report.tensors:
        check(each, [model[each.name] for model in inputs], base[each.name], output[each.name])
    order = [each.name for each in report.tensors]

    def whole(model: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([model[name] for name in order])

    check(report.whole, [whole(model) for model in inputs], whole(base), whole(output))
    assert [each.layer for each in report.layers] == [0, 1]
    assert report.settings["merge_method"] == settings["merge_method"]
    assert report.findings


def test_a_linear_merge_is_the_sum_of_its_weights(models: Path, tmp_path: Path) -> None:
    report = merged(
        models, tmp_path / "out", merge_method="linear", weight_list=[0.5, 0.25, 0.25], output_dtype="float32"
    )
    assert [each.coefficient for each in report.whole.models] == [
        pytest.approx(each, abs=1e-4) for each in (0.5, 0.25, 0.25)
    ]
    assert report.whole.residual is not None
    assert report.whole.residual < 1e-3
    assert repr(report).startswith("<MergeReport: 0.4")


def test_without_a_base_the_first_model_is_it(models: Path, tmp_path: Path) -> None:
    package.merge(model_path_list=[models / "a", models / "c"], merge_method="slerp", slerp_alpha=0.25,
                  output_path=tmp_path / "out", progress=False)  # fmt: skip
    report = report_output(tmp_path / "out")
    assert (report.base, report.base_given, report.models) == (str(models / "a"), False, (str(models / "c"),))
    assert report.whole.models[0].projection == pytest.approx(0.25, abs=0.02)


def test_the_base_of_a_configuration_is_it(models: Path, tmp_path: Path) -> None:
    text = f"merge_method: task_arithmetic\nbase_model: {models / 'base'}\nmodels:\n" + "".join(
        f"  - {{model: {models / name}, parameters: {{weight: {weight}}}}}\n"
        for name, weight in (("a", 0.5), ("c", 0.25))
    )
    package.merge(mergekit=text, output_path=tmp_path / "out", progress=False, output_dtype="float32")
    report = report_output(tmp_path / "out")
    assert (report.base, report.base_given) == (str(models / "base"), True)
    assert [each.coefficient for each in report.whole.models] == [pytest.approx(each, abs=0.01) for each in (0.5, 0.25)]


def test_adapters_are_inputs_too(tmp_path: Path) -> None:
    make_models(tmp_path / "models")
    place = tmp_path / "models"
    package.merge(model_path_list=[place / "lora", place / "code"], base_model_path=place / "base",
                  output_path=tmp_path / "out", weight_list=[1, 1], output_dtype="float32", progress=False)  # fmt: skip
    report = report_output(tmp_path / "out")
    assert [each.coefficient for each in report.whole.models] == [pytest.approx(1, abs=0.01)] * 2


def test_a_sample_is_the_same_blocks_of_all(tmp_path: Path) -> None:
    plain = np.arange(10 * BLOCK + 7, dtype=np.float32)
    model = open_checkpoint(make_model(tmp_path / "m", {"w": plain}, config=None))
    tensor = model["w"]
    sample = SampledTensor("w", tensor.dtype, (4 * BLOCK - BLOCK + 7,), tensor.file, tensor.offset, tensor, 5)
    wanted = np.concatenate([plain[:BLOCK], plain[5 * BLOCK : 6 * BLOCK], plain[10 * BLOCK :]])
    with sample.open() as read:
        for start, count in ((0, 2 * BLOCK + 7), (3, BLOCK), (BLOCK - 1, 2), (2 * BLOCK, 7)):
            buffer = np.empty(count, np.float32)
            read(start, buffer.data.cast("B"))
            assert np.array_equal(buffer, wanted[start : start + count])


def test_a_sample_tells_about_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of sums in which small tensors, which are whole in it, weigh as much as large ones."""
    random = np.random.default_rng(0)
    base = random.standard_normal((512, 512)).astype(np.float32)
    norm = 100 * np.ones(4096, np.float32)
    monkeypatch.setattr("modelfuse.planning.diff_sample.LEAST_IN_ALL", 1)
    for name, seed in (("base", 0), ("a", 1), ("b", 2)):
        noise = 0.1 * np.random.default_rng(seed).standard_normal(base.shape) if seed else 0
        tensors = {"model.layers.0.mlp.up_proj.weight": (base + noise).astype(np.float32), "model.norm.weight": norm}
        make_model(tmp_path / name, tensors)
    settings: dict[str, Any] = {
        "model_path_list": [tmp_path / "a", tmp_path / "b"], "base_model_path": tmp_path / "base",
        "merge_method": "ties", "output_path": tmp_path / "out",
    }  # fmt: skip
    package.merge(**settings, progress=False)
    full, part = report_output(tmp_path / "out"), compare_output(Recipe.parse(settings), tmp_path / "out", sample=255)
    assert part.diff.bytes_read < full.diff.bytes_read / 4
    assert part.sample == 255
    assert part.whole.elements == full.whole.elements
    assert part.diff.facts == tuple(replace(each, matrix=False) for each in full.diff.facts)
    for name in ("relative", "unchanged", "residual"):
        assert getattr(part.whole, name) == pytest.approx(getattr(full.whole, name), rel=0.05)
    for one, other in zip(full.whole.models, part.whole.models, strict=True):
        assert one.projection == pytest.approx(other.projection, rel=0.05)
        assert one.dropped == pytest.approx(other.dropped, abs=0.02)


@needs_browser
def test_the_page_of_a_merge_shows_what_became_of_each_model(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    report = merged(models, tmp_path / "out", merge_method="ties")
    package.draw(report, tmp_path / "page.html")
    steps = """
    const maps = () => [...document.querySelectorAll("#maps > div")].length;
    const first = { maps: maps(), cells: marks("map-2"), heads: document.querySelectorAll("#models tbody tr").length };
    await choose("measure", "residual");
    return { first, second: { maps: maps(), cells: marks("map-0") }, text: document.body.textContent };
    """
    found = use(tmp_path / "page.html", steps)
    assert (found["first"]["maps"], found["first"]["heads"], found["second"]["maps"]) == (3, 4, 1)
    shown = {(each["column"], each["module"]): each["value"] for each in found["first"]["cells"]}
    for cell in report.cells:
        key = ("–" if cell.layer is None else str(cell.layer), cell.module)
        assert shown[key] == pytest.approx(cell.models[2].projection, rel=1e-3)
    assert len(found["second"]["cells"]) == len(report.cells)
    assert "out (output)" in found["text"]
    assert "merge_method" in found["text"]


def test_what_cannot_be_compared_is_told(models: Path, tmp_path: Path, modelfuse: Run) -> None:
    with pytest.raises(CheckpointError, match="not the output of a merge"):
        report_output(models / "a")
    here = tmp_path / "models"
    shutil.copytree(models, here)
    merged(here, tmp_path / "out", merge_method="linear")
    shutil.move(here / "a", tmp_path / "elsewhere")
    said = modelfuse("report", tmp_path / "out")
    assert said.status == 2
    assert "is missing" in said.err
    assert "modelfuse diff MODEL … OUT --base BASE" in said.err
    shutil.move(tmp_path / "elsewhere", here / "a")
    (here / "a" / "model.safetensors").write_bytes((here / "b" / "model.safetensors").read_bytes())
    assert "written again since the merge" in modelfuse("report", tmp_path / "out").err
    config = json.loads((tmp_path / "out" / "merge_config.json").read_text())
    config["model_path_list"][0] = "https://example.invalid/model"
    (tmp_path / "out" / "merge_config.json").write_text(json.dumps(config))
    assert "in stores, which a report does not ask" in modelfuse("report", tmp_path / "out").err


def test_the_command_shows_it_and_draws_it(models: Path, tmp_path: Path, modelfuse: Run) -> None:
    pytest.importorskip("vl_convert")
    merged(models, tmp_path / "out", merge_method="ties")
    page = tmp_path / "page.html"
    said = modelfuse("report", tmp_path / "out", "--html", page, "--image", tmp_path / "p.svg", "--measure", "dropped")
    assert said.status == 0, said.err
    assert "of its difference is in the output" in said.out.replace("times its", "of its")
    assert "what the merge kept of a, b, c" in page.read_text()
    assert "Dropped elements" in (tmp_path / "p.svg").read_text()
    read = document(modelfuse("report", tmp_path / "out", "--json"), "report")
    assert len(read["whole"]["models"]) == 3
    wrong = modelfuse("report", tmp_path / "out", "--image", tmp_path / "p.svg", "--measure", "droped")
    assert wrong.status == 2
    assert "There is no measure 'droped'" in wrong.err


def test_a_merge_draws_what_it_kept(models: Path, tmp_path: Path, modelfuse: Run) -> None:
    pytest.importorskip("vl_convert")
    words = ["--model_path_list", models / "a", models / "b", "--base_model_path", models / "base"]
    page = tmp_path / "page.html"
    said = modelfuse("merge", *words, "--output_path", tmp_path / "out", "--html", page)
    assert said.status == 0, said.err
    assert str(page) in said.out
    assert "what the merge kept of a, b" in page.read_text()
    (tmp_path / "mine").write_text("mine")
    refused = modelfuse("merge", *words, "--output_path", tmp_path / "other", "--html", tmp_path / "mine")
    assert refused.status == 2
    assert "modelfuse has not written it" in refused.err
    assert not (tmp_path / "other").exists()
    assert modelfuse("check", *words, "--html", page).status == 2
