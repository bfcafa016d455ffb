"""Pictures of what differs: a page that needs no network, used in a real browser, and images for papers."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import needs_browser, use

from modelfuse.errors import MissingExtraError, OutputError, RecipeError
from modelfuse.inspection.diff_result import (
    DENSITIES,
    Change,
    ComparedTensorFacts,
    Diff,
    Kept,
    ModelPair,
    NotCompared,
    SideDifference,
    Suggestion,
    TensorGroup,
)
from modelfuse.inspection.pictures.images import write_image
from modelfuse.inspection.pictures.measures import MEASURES
from modelfuse.inspection.pictures.page import _settings_of, page, write_page
from modelfuse.inspection.pictures.specs import places_spec

pytest.importorskip("vl_convert")

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")
HOSTILE = "</script><script>window.bad = 1</script><img src=x onerror='window.bad = 1'>"


def group(draw: random.Random, name: str, layer: int | None, module: str | None, models: int) -> TensorGroup:
    changes = tuple(
        Change(draw.random(), draw.random() / 10, draw.random(), draw.uniform(-1, 1), draw.random(), draw.randrange(9),
               0, draw.random(), tuple(Kept(each, each, min(1.0, 3 * each), each) for each in DENSITIES))
        for _ in range(models)
    )  # fmt: skip
    pairs = tuple(
        ModelPair(i, j, (i + j) / 100, draw.random(), draw.random(), draw.random(),
             None if module == "input_layernorm" else draw.random(), 0.01)
        for i in range(models) for j in range(models) if i != j
    )  # fmt: skip
    return TensorGroup(name, "", layer, module, 1, 1000, 10 * draw.random(), 0, changes, pairs)


def made(layers: int, models: Sequence[str], odd: str = "") -> Diff:
    """What a diff might have found, with numbers that are all different."""
    draw, count = random.Random(0), len(models)
    cells = [group(draw, "model.embed_tokens.weight", None, "embed_tokens", count)]
    for layer in range(layers):
        cells += [group(draw, f"model.layers.{layer}.{kind}{odd}.weight", layer, kind, count) for kind in KINDS]
    rows = tuple(group(draw, f"layer {layer}", layer, None, count) for layer in range(layers))
    facts = tuple(ComparedTensorFacts(each.name, "bfloat16", (10, 100), True) for each in cells)
    return Diff(
        f"/base{odd}", True, tuple(models), group(draw, "model", None, None, count), rows, tuple(cells[:6]),
        tuple(cells), tuple(cells), facts, (NotCompared(f"bias{odd}", "only in one"),),
        (SideDifference(0, "config", f"rope_theta{odd} is another"),), (f"much{odd} differs",), False, 10**9, 1.0,
    )  # fmt: skip


def written(tmp_path: Path, found: Diff) -> Path:
    path = tmp_path / "report.html"
    write_page(found, path)
    return path


def test_the_page_is_one_file_that_asks_nobody(tmp_path: Path) -> None:
    text = written(tmp_path, made(2, ["/a/code", "/a/prose"])).read_text()
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"""(src|href)\s*=|url\(|@import""", own)
    assert "default-src 'none'" in text
    assert len(text) < 1_500_000


def test_advice_is_on_the_page(tmp_path: Path) -> None:
    advice = Suggestion("They disturb <each> other.", {"merge_method": "ridge", "weight_list": [1.0, 0.5]})
    text = page(replace(made(2, ["/a/code", "/a/prose"]), advice=(advice,)))
    assert "They disturb &lt;each&gt; other.<br><code>--merge_method ridge --weight_list 1 0.5</code>" in text
    assert "Worth trying" not in page(made(2, ["/a/code", "/a/prose"]))


def test_text_of_strangers_is_text(tmp_path: Path) -> None:
    text = page(made(2, [f"/{HOSTILE}/a", "b"], HOSTILE))
    assert HOSTILE not in text
    assert "<img src=x" not in text
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    assert HOSTILE in json.loads(found[1])["cells"]["name"][1]


@needs_browser
def test_a_browser_shows_strangers_text_as_it_is(tmp_path: Path) -> None:
    steps = """
    const path = document.querySelectorAll("#map-0 .mark-rect.role-mark path")[3], place = path.getBoundingClientRect();
    for (const kind of ["pointerover", "pointermove", "mouseover", "mousemove"]) {
      path.dispatchEvent(new MouseEvent(kind, { clientX: place.x + 2, clientY: place.y + 2, bubbles: true }));
    }
    await new Promise((done) => setTimeout(done, 200));
    const tip = document.getElementById("vg-tooltip-element");
    return { bad: window.bad === undefined, images: document.querySelectorAll("img").length,
      title: document.querySelector("h1").textContent, tensors: document.querySelector("#tensors").textContent,
      tip: tip && tip.textContent };
    """
    found = use(written(tmp_path, made(2, [f"/{HOSTILE}/a", "b"], HOSTILE)), steps)
    assert found["bad"]
    assert found["images"] == 0
    assert HOSTILE in found["tensors"]
    assert "mlp.up_proj" in found["tip"]
    assert HOSTILE in found["tip"]


@needs_browser
def test_200_layers_of_12_models_are_drawn_and_can_be_looked_through(tmp_path: Path) -> None:
    diff = made(200, [f"/models/m{number}" for number in range(12)])
    steps = """
    const maps = () => document.querySelectorAll("#maps > div").length;
    const first = { maps: maps(), cells: marks("map-3") };
    const lines = document.querySelectorAll("#lines .mark-line.role-mark path").length;
    await choose("measure", "interference");
    await choose("of", "5");
    const second = { maps: maps(), cells: marks("map-0") };
    const matrix = marks("matrix").length, error = marks("matrix")[0].error;
    const rows = () => [...document.querySelectorAll("#tensors tbody tr")].map((row) => row.children[0].textContent);
    await choose("measure", "largest");
    document.querySelectorAll("#tensors th")[4].click();
    const sorted = rows();
    const find = document.getElementById("find");
    find.value = "layers.77.MLP.up";
    find.dispatchEvent(new Event("input"));
    const narrowed = rows();
    const count = Number(document.body.dataset.drawn) + 1;
    document.querySelector("#choose-modules input").click();
    await drawn(count);
    const fewer = marks("map-0").length;
    const light = getComputedStyle(document.body).backgroundColor;
    document.getElementById("theme").click();
    const dark = getComputedStyle(document.body).backgroundColor;
    const fits = document.body.scrollWidth <= innerWidth;
    return { first, lines, second, matrix, error, sorted, narrowed, fewer, light, dark, fits };
    """
    found = use(written(tmp_path, diff), steps, "--window-size=1200,1600")
    assert found["first"]["maps"] == 4
    assert found["lines"] == 12
    _same(found["first"]["cells"], diff, [each.models[3].relative for each in diff.cells])
    by_value = sorted(found["first"]["cells"], key=lambda each: float(each["value"]))
    assert by_value[0]["fill"] != by_value[-1]["fill"]
    assert found["second"]["maps"] == 4
    _same(found["second"]["cells"], diff, [each.pair(5, 0).interference for each in diff.cells])
    assert found["matrix"] == 12 * 11
    assert found["error"] == "0.01"
    largest = sorted(diff.tensors, key=lambda each: -each.models[1].largest)
    assert found["sorted"][:5] == [each.name for each in largest[:5]]
    assert found["narrowed"] == ["model.layers.77.mlp.up_proj.weight"]
    assert found["fewer"] == 1000
    assert found["light"] != found["dark"]
    assert found["fits"]


def _same(cells: Any, diff: Diff, values: Sequence[float | None]) -> None:
    assert len(cells) == len(diff.cells)
    shown = {(each["column"], each["module"]): each["value"] for each in cells}
    for cell, value in zip(diff.cells, values, strict=True):
        key = ("–" if cell.layer is None else str(cell.layer), cell.module)
        assert shown[key] == (None if value is None else pytest.approx(value, rel=1e-3))


@needs_browser
def test_one_model_without_layers_is_drawn(tmp_path: Path) -> None:
    diff = made(0, ["/a"])
    steps = 'return { cells: marks("map-0").length, pairs: document.getElementById("matrix-section").hidden };'
    found = use(written(tmp_path, diff), steps)
    assert found == {"cells": 1, "pairs": True}


@pytest.mark.parametrize("measure", ["relative", "cosine", "interference"])
def test_images_are_drawn_without_a_browser(tmp_path: Path, measure: str) -> None:
    diff = made(3, ["/a/<b>&", "/a/prose"])
    write_image(diff, tmp_path / "p.svg", measure)
    text = (tmp_path / "p.svg").read_text()
    assert text.count('aria-roledescription="rect mark') or text.count("mark-rect")
    assert "&lt;b&gt;&amp;" in text
    write_image(diff, tmp_path / "p.svg", measure)


def test_an_image_says_what_made_it(tmp_path: Path) -> None:
    write_image(made(2, ["/a", "/b"]), tmp_path / "p.png")
    content = (tmp_path / "p.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert b"modelfuse" in content[:100]


def test_nobody_elses_file_is_replaced(tmp_path: Path) -> None:
    diff = made(1, ["/a"])
    (tmp_path / "mine.svg").write_text("<svg/>")
    with pytest.raises(OutputError, match="modelfuse has not written it"):
        write_image(diff, tmp_path / "mine.svg")
    write_image(diff, tmp_path / "mine.svg", overwrite=True)
    with pytest.raises(OutputError, match="no folder"):
        write_page(diff, tmp_path / "absent" / "r.html")
    with pytest.raises(RecipeError, match=r"\.svg or \.png"):
        write_image(diff, tmp_path / "p.gif")
    with pytest.raises(RecipeError, match="no measure"):
        write_image(diff, tmp_path / "p.svg", "cosin")


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(MissingExtraError, match="not installed") as page_error:
        write_page(made(1, ["/a"]), tmp_path / "r.html")
    with pytest.raises(MissingExtraError, match="not installed"):
        write_image(made(1, ["/a"]), tmp_path / "r.svg")
    assert "[report]'" in str(page_error.value.hint)
    assert not any(tmp_path.iterdir())


def test_every_measure_has_a_name_of_its_own() -> None:
    assert len({each.short for each in MEASURES.values()}) == len({each.title for each in MEASURES.values()}) == 14


def test_labels_of_points_do_not_overlap() -> None:
    """Where models are close together, some have their name in a tooltip alone."""
    points = [{"x": x, "y": 0.0, "name": f"expert-{number}", "kind": "model"} for number, x in enumerate((0, 0.1, 0.2))]
    points += [{"x": x, "y": y, "name": name, "kind": "base"} for x, y, name in ((100, 0, "far"), (50, 50, "base"))]
    spec = places_spec({"points": points, "center": [50, 25], "span": [140, 70]})
    labels = {each["name"]: (each["x"], each["y"]) for each in spec["layer"][1]["data"]["values"]}
    assert {"far", "base"} < {*labels}
    assert len({*labels.values()}) == len(labels) < len(points) + 1
    crowded = [{**points[0], "name": f"expert-{number}"} for number in range(12)]
    spec = places_spec({"points": [*crowded, *points[3:]], "center": [50, 25], "span": [140, 70]})
    assert len(spec["layer"][1]["data"]["values"]) < len(crowded)
    assert len(spec["data"]["values"]) == len(crowded) + 2


def test_a_recipe_has_its_own_settings_before_those_by_default() -> None:
    own, rest = _settings_of({"merge_method": "ties", "slerp_alpha": 0.5, "reserve_p": 0.3}).split("<details>")
    assert "merge_method" in own
    assert "reserve_p" in own
    assert "slerp_alpha" in rest
