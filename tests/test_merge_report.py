"""What a merge kept of its inputs: every number against plain float64 definitions over whole tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import needs_browser, use
from conftest import CONFIG, Said, array, bf16, make_model, read_model
from msgspec import structs
from test_documents import document

import modelfuse as package
from modelfuse.cli.demo import make_models
from modelfuse.errors import CheckpointError, OutputError
from modelfuse.inspection.diff import diff_recipe
from modelfuse.inspection.diff_advice import _was_done
from modelfuse.inspection.diff_measures import Suggestion
from modelfuse.inspection.merge_outcome import MergeOutcome
from modelfuse.inspection.merge_report import MergeReport, compare_output
from modelfuse.inspection.report_output import report_output
from modelfuse.planning.diff_plan import make_diff_plan
from modelfuse.planning.diff_sample import sample_of
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


def check(outcome: MergeOutcome, tuned: list[np.ndarray], base: np.ndarray, output: np.ndarray) -> None:
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


def test_moved_layers_are_told(models: Path, tmp_path: Path) -> None:
    slices = "".join(
        f"  - sources: [{{model: {models / name}, layer_range: [{first}, {first + 1}]}}]\n"
        for name, first in (("a", 1), ("b", 0))
    )
    text = f"merge_method: passthrough\nslices:\n{slices}"
    package.merge(mergekit=text, output_path=tmp_path / "out", progress=False)
    assert "compared by their names" in report_output(tmp_path / "out").findings[0]


def test_adapters_are_inputs_too(tmp_path: Path) -> None:
    make_models(tmp_path / "models")
    place = tmp_path / "models"
    package.merge(model_path_list=[place / "lora", place / "code"], base_model_path=place / "base",
                  output_path=tmp_path / "out", weight_list=[1, 1], output_dtype="float32", progress=False)  # fmt: skip
    report = report_output(tmp_path / "out")
    assert [each.coefficient for each in report.whole.models] == [pytest.approx(1, abs=0.01)] * 2


def sampled(tmp_path: Path, shapes: dict[str, tuple[int, ...]], **settings: Any) -> tuple[MergeReport, MergeReport]:
    """What the report and a sample tell of the same merge of two models, whose elements differ by correlated noise."""
    draw = np.random.default_rng(0)
    base = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    common = {name: 0.1 * draw.standard_normal(shape) for name, shape in shapes.items()}
    make_model(tmp_path / "base", base, config=CONFIG)
    for name in "ab":
        own = {name: 0.1 * draw.standard_normal(shape) for name, shape in shapes.items()}
        tuned = {name: (each + common[name] + own[name]).astype(np.float32) for name, each in base.items()}
        make_model(tmp_path / name, tuned, config=CONFIG)
    named: dict[str, Any] = {"model_path_list": [tmp_path / "a", tmp_path / "b"], "base_model_path": tmp_path / "base",
                             "merge_method": "ties", "output_path": tmp_path / "out"}  # fmt: skip
    package.merge(**named, **settings, progress=False)
    return report_output(tmp_path / "out"), compare_output(Recipe.parse(named), tmp_path / "out", sample=True)


def test_a_sample_tells_about_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a small tensor, which is read whole, weighs as much as large ones."""
    monkeypatch.setattr("modelfuse.planning.diff_sample.LEAST_RUNS", 16)
    monkeypatch.setattr("modelfuse.planning.diff_sample.LEAST_IN_ALL", 1)
    shapes = {f"model.layers.{layer}.mlp.{name}.weight": (256, 192) for layer in range(4) for name in ("up_proj", "a")}
    full, part = sampled(tmp_path, {**shapes, "model.norm.weight": (192,)})
    assert part.sample is not None
    assert part.diff.bytes_read == part.sample.bytes_read < full.diff.bytes_read / 4
    assert part.sample.share == pytest.approx(1 / 16, rel=0.01)
    assert part.whole.elements == full.whole.elements
    assert part.diff.facts == full.diff.facts
    assert part.tensors[-1].relative == pytest.approx(full.tensors[-1].relative, rel=1e-6)
    error = part.sample.model_error
    assert 0 < error < part.sample.tensor_error < 0.05
    for one, other in zip(full.diff.whole.models, part.diff.whole.models, strict=True):
        assert other.norm == pytest.approx(one.norm, rel=4 * error)
        assert other.unchanged == pytest.approx(one.unchanged, abs=0.02)
        assert other.density_90 == pytest.approx(one.density_90, abs=0.02)
        for kept, wanted in zip(other.kept, one.kept, strict=True):
            assert kept.trim_squares == pytest.approx(wanted.trim_squares, abs=0.02)
    for pair, true in zip(part.diff.whole.pairs, full.diff.whole.pairs, strict=True):
        assert pair.cosine == pytest.approx(true.cosine, abs=0.02)
        assert pair.sign_conflict == pytest.approx(true.sign_conflict, abs=0.02)
        assert pair.interference is not None
        assert true.interference is not None
        assert 0 < (pair.interference_error or 0) < 0.1
        assert abs(pair.interference - true.interference) < 4 * (pair.interference_error or 0)
    for taken, exact in zip(part.whole.models, full.whole.models, strict=True):
        assert taken.projection == pytest.approx(exact.projection, rel=0.05)
        assert taken.dropped == pytest.approx(exact.dropped, abs=0.02)


def test_of_small_models_a_sample_is_everything(tmp_path: Path) -> None:
    """All numbers are those of the report, but for orders of magnitude, which are counted in bins there."""
    shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (24, 40) for layer in range(2)}
    full, part = sampled(tmp_path, {**shapes, "model.norm.weight": (40,)}, on_nonfinite="propagate")
    assert part.sample is not None
    assert (part.sample.share, part.sample.model_error, part.sample.tensor_error) == (1, 0, 0)
    for group, wanted in zip((*part.diff.cells, part.diff.whole), (*full.diff.cells, full.diff.whole), strict=True):
        for model, true in zip(group.models, wanted.models, strict=True):
            for name in ("norm", "relative", "unchanged", "along_base", "largest"):
                assert getattr(model, name) == pytest.approx(getattr(true, name), rel=1e-4, abs=1e-6)
        for pair, pair_wanted in zip(group.pairs, wanted.pairs, strict=True):
            for name in ("cosine", "both_changed", "sign_conflict", "interference"):
                same(getattr(pair, name), getattr(pair_wanted, name))


def test_a_sample_leaves_out_what_is_not_finite(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    base = draw.standard_normal((24, 40)).astype(np.float32)
    for number, name in enumerate(("base", "a", "b")):
        tensor = base + (0.1 * draw.standard_normal(base.shape) if number else 0)
        tensor[number, number] = np.nan if number else np.inf
        make_model(tmp_path / name, {"model.layers.0.mlp.up_proj.weight": tensor.astype(np.float32)}, config=CONFIG)
    (tmp_path / "b" / "merge_report.json").write_text("{}")
    recipe = Recipe.parse({"model_path_list": [tmp_path / "a"], "base_model_path": tmp_path / "base"})
    full, part = (compare_output(recipe, tmp_path / "b", sample=each).diff.whole for each in (False, True))
    assert part.base_nonfinite == full.base_nonfinite == 1
    assert [each.nonfinite for each in part.models] == [each.nonfinite for each in full.models] == [1, 1]
    assert [each.norm for each in part.models] == pytest.approx([each.norm for each in full.models], rel=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_sample_is_the_same_runs_of_all(tmp_path: Path, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of tensors that are not stored as they are read."""
    monkeypatch.setattr("modelfuse.planning.diff_sample.LEAST_IN_ALL", 1)
    plain = np.arange(64 * 2048, dtype=np.float32).reshape(2048, 64)
    layout = {"input_layout": ["paddle", "hf"]} if transposed else {}
    name = "model.layers.0.mlp.up_proj.weight"
    make_model(tmp_path / "a", {name: plain.T if transposed else plain}, config=CONFIG)
    make_model(tmp_path / "b", {name: plain + 1}, config=CONFIG)
    recipe = diff_recipe([tmp_path / "a"], tmp_path / "b", layout)
    (batch,) = sample_of(make_diff_plan(recipe, False))
    assert batch.runs == (32, 64, True)
    rows = [start // 64 for starts in batch.starts for start in starts]
    assert [row // 64 for row in rows] == [*range(32)]
    for source, shift in ((0, 0), (1, 1)):
        buffer = np.empty((32, 64), np.float32)
        batch.read(source, buffer.data.cast("B"))
        assert np.array_equal(buffer, plain[rows] + shift)


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
    assert "were changed since the merge" in modelfuse("report", tmp_path / "out").err
    config = json.loads((tmp_path / "out" / "merge_config.json").read_text())
    config["model_path_list"][0] = "https://example.invalid/model"
    (tmp_path / "out" / "merge_config.json").write_text(json.dumps(config))
    assert "in stores, which report does not access" in modelfuse("report", tmp_path / "out").err


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


def test_other_settings_are_suggested_for_the_inputs_of_a_merge(models: Path, tmp_path: Path, modelfuse: Run) -> None:
    """By the inputs alone, and without what the merge did."""
    alone = package.diff(*(models / name for name in "abc"), base=models / "base", progress=False)
    assert [each.settings["merge_method"] for each in alone.advice] == ["ridge"]
    assert merged(models, tmp_path / "ties", merge_method="ties").advice == alone.advice
    assert "worth trying: 3 models" in modelfuse("report", tmp_path / "ties").out.replace("\n", " ")
    assert merged(models, tmp_path / "ridge", merge_method="ridge").advice == ()
    report = merged(models, tmp_path / "sum", merge_method="linear", weight_list=[0.3, 0.25, 0.3])
    suggested = Suggestion("", {"merge_method": "linear", "weight_list": [0.27, 0.27, 0.27]})
    assert _was_done(suggested, report.settings)
    assert not _was_done(
        structs.replace(suggested, settings={**suggested.settings, "weight_list": [1, 1, 1]}), report.settings
    )


def test_a_merge_in_python_draws_what_it_kept(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    page = tmp_path / "page.html"
    settings: dict[str, Any] = {"model_path_list": [models / "a", models / "b"], "base_model_path": models / "base",
                                "progress": False}  # fmt: skip
    result = package.merge(**settings, output_path=tmp_path / "out", html=str(page))
    assert result.html == page
    assert str(page) in result._repr_html_()
    assert "what the merge kept of a, b" in page.read_text()
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OutputError, match="modelfuse has not written it"):
        package.merge(**settings, output_path=tmp_path / "other", html=tmp_path / "mine")
    assert not (tmp_path / "other").exists()
    assert package.merge(**settings, output_path=tmp_path / "other").html is None
    assert "html: " in (package.merge.__doc__ or "")


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
