"""``modelfuse diff``: what differs between models, held against plain float64 definitions over whole tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapting import Q, adapter_of
from conftest import CONFIG, ROOT, Said, bf16, make_model, random_tensors
from jsonschema import Draft202012Validator
from msgspec import json as encoder

import modelfuse as modelfuse_package
from modelfuse.cli import console
from modelfuse.cli.diff_document import of_diff
from modelfuse.errors import MissingExtraError, RecipeError
from modelfuse.inspection.diff_result import (
    Change,
    ComparedTensorFacts,
    Diff,
    Kept,
    ModelPair,
    NotCompared,
    SideDifference,
    TensorGroup,
)

Run = Callable[..., Said]


def example() -> Diff:
    kept = Kept(0.1, 0.1, 0.4, 0.05)
    change = Change(1.0, 0.1, 0.5, 0.0, 0.3, 2, 0, 0.4, (kept,))
    pairs = (
        ModelPair(0, 1, 0.1, 0.3, 0.5, 0.4, 0.2, 0.01),
        ModelPair(1, 0, 0.1, 0.3, 0.5, 0.4, None, None),
    )
    group = TensorGroup("w", "", 0, "mlp.up_proj", 1, 12, 10.0, 0, (change, change), pairs)
    return Diff(
        "base", True, ("a", "b"), group, (group,), (group,), (group,), (group,),
        (ComparedTensorFacts("w", "bfloat16", (3, 4), True),), (NotCompared("v", "only in a"),),
        (SideDifference(0, "config", "rope_theta is another", "rope_theta", "1", "2"),), ("nothing",), False, 1, 0.1,
    )  # fmt: skip


def test_the_document_fits_its_schema() -> None:
    schema = json.loads((ROOT / "docs" / "schemas" / "diff.json").read_text())
    read = json.loads(encoder.encode(of_diff(example())))
    Draft202012Validator(schema).validate(read)
    assert read["document"] == "diff/1"


def test_pairs_are_found_by_their_models() -> None:
    whole = example().whole
    assert [(whole.pair(*each).model, whole.pair(*each).other) for each in ((0, 1), (1, 0))] == [(0, 1), (1, 0)]


# What people and programs see


def test_the_command_tells_what_matters(modelfuse: Run) -> None:
    models = ROOT / "demo" / "models"
    said = modelfuse("diff", models / "code", models / "prose", models / "aligned", "--base", models / "base")
    assert said.status == 0
    assert len(said.out.partition("\n\n")[2].partition("\n\n")[0].splitlines()) <= 10
    for part in (
        "3 models against", "Distance from the base, relative to its norm: aligned 10.2 %, code 5.2 %, prose 4.8 %.",
        "prose may suffer most: on its inputs, aligned acts 1.74 (± ", "interference:", "layers 0 to 3",
    ):  # fmt: skip
        assert part in said.out
    assert all(len(line) <= 80 for line in said.out.partition("‖τ‖/‖b‖")[2].splitlines())
    assert "\x1b" not in said.out


def test_a_terminal_shows_colours_unless_told_otherwise(modelfuse: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    models = ROOT / "demo" / "models"
    words = ("diff", models / "base", models / "code", models / "prose")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    console.out.__dict__.pop("console", None)
    coloured = modelfuse(*words).out
    assert re.search("\x1b\\[[0-9;]*m▒", coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    console.out.__dict__.pop("console", None)
    plain = modelfuse(*words).out
    console.out.__dict__.pop("console", None)
    assert re.search("\x1b\\[[34][0-9]*m", plain) is None
    assert "▒" in plain
    shown = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", coloured)
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_many_layers_and_models_fit(modelfuse: Run, tmp_path: Path) -> None:
    shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (4, 6) for layer in range(200)}
    made = []
    for seed in range(13):
        draw = np.random.default_rng(seed)
        made.append(make_model(tmp_path / f"m{seed}", {name: bf16(draw.standard_normal(each))
                                                       for name, each in shapes.items()}))  # fmt: skip
    said = modelfuse("diff", *made)
    assert said.status == 0
    assert "layers 0 to 199, 4 a column" in said.out
    assert all(len(line) <= 80 for line in said.out.partition("interference:")[2].splitlines())


def test_the_document(modelfuse: Run, pair: tuple[Path, Path]) -> None:
    said = modelfuse("diff", *pair, "--json")
    schema = json.loads((ROOT / "docs" / "schemas" / "diff.json").read_text())
    read = json.loads(said.out)
    Draft202012Validator(schema).validate(read)
    assert (read["base"], read["base_given"], read["models"]) == (str(pair[0]), False, [str(pair[1])])
    assert [each["name"] for each in read["tensors"]] == [each["name"] for each in read["facts"]]
    assert read["whole"]["pairs"] == []
    assert {(each["layer"], each["module"]) for each in read["cells"]} == {
        (None, "embed_tokens"), (0, "mlp"), (1, "mlp"), (None, "norm"), (None, "lm_head"),
    }  # fmt: skip


def test_python_gives_tables(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    done: list[tuple[int, int]] = []
    found = modelfuse_package.diff(*pair, pair[0], n_process=1, progress=lambda *each: done.append(each))
    assert repr(found) == f"<Diff: 2 models against {pair[0]}: 5 tensors>"
    assert sum(count for count, _ in done) == done[0][1] == found.bytes_read
    frame = found.to_pandas("layers")
    assert isinstance(frame, pandas.DataFrame)
    assert [*frame["layer"]] == [0, 0, 1, 1]
    assert [*frame["model"]] == ["B", "A"] * 2
    assert frame["norm"][0] == found.layers[0].models[0].norm
    assert frame["trim_squares_0.2"][0] == found.layers[0].models[0].kept[3].trim_squares
    pairs = found.to_pandas(pairs=True)
    assert len(pairs) == 5 * 2
    assert pairs["interference"].isna().any()
    assert found.to_pandas("whole")["unchanged"][1] == 1
    assert "<table>" in found._repr_html_()
    with pytest.raises(RecipeError, match="no level 'tensor'"):
        found.to_pandas("tensor")  # type: ignore[arg-type]
    monkeypatch.setattr("modelfuse.inspection.diff_tables.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match="needs pandas"):
        found.to_pandas()


def test_what_is_beside_the_weights(tmp_path: Path) -> None:
    tensors = random_tensors(1)
    base = make_model(tmp_path / "base", tensors, config=CONFIG | {"rope_theta": 1, "num_attention_heads": 2})
    other = make_model(
        tmp_path / "other", tensors, config=CONFIG | {"rope_theta": 2, "num_attention_heads": 4},
        files={"chat_template.jinja": "x", "preprocessor_config.json": '{"size": 1}'},
    )  # fmt: skip
    (base / "preprocessor_config.json").write_text('{"size": 2}')
    found = modelfuse_package.diff(base, other, progress=False)
    assert [(each.model, each.about, each.key, each.fatal) for each in found.side_differences] == [
        (0, "config", "num_attention_heads", True), (0, "config", "rope", False), (0, "template", None, False),
        (0, "other", None, False),
    ]  # fmt: skip
    assert "1" in str(found.side_differences[1].base_value)
    assert "the base has none" in found.side_differences[2].text
    assert found.findings[0] == "other is the base: no element that was compared differs."
    assert "so a merge would be meaningless" in found.findings[1]


def test_what_cannot_be_compared_is_told(tmp_path: Path) -> None:
    tensors = random_tensors(1)
    base = make_model(tmp_path / "base", tensors | {"ids": np.arange(3)})
    grown = {**random_tensors(2), "model.embed_tokens.weight": np.ones((13, 4), np.float32)}
    del grown["lm_head.weight"]
    other = make_model(tmp_path / "other", grown | {"ids": np.arange(3)})
    found = modelfuse_package.diff(base, other, progress=False)
    assert {each.tensor: each.because for each in found.not_compared} == {
        "ids": "int64, not weights",
        "lm_head.weight": f"not in {other}",
        "model.embed_tokens.weight": f"other shapes: [13, 4] in {other}, [11, 4] in {base}; "
        f"{other} has no tokenizer.json, so its vocabulary is not known",
    }
    assert len(found.tensors) == 3
    assert "Not compared: " in found.findings[-1]


def test_mistakes_are_refused(refuse: Callable[..., str], pair: tuple[Path, Path], tmp_path: Path) -> None:
    refuse("diff", pair[0], says=["at least two models"], hint="modelfuse diff A B")
    refuse("diff", says=["none is given"])
    refuse("diff", *pair, "--bas", pair[0], says=["--bas"])
    refuse("diff", *pair, "--memory", "much", says=["memory"])
    refuse("diff", pair[0], tmp_path / "absent", says=["absent"])
    refuse("diff", *pair, "--device", "gpu", says=["diff measures on the CPUs"], hint="--engine ray")
    refuse("diff", *pair, "--ray_address", "10.0.0.1:6379", says=["but engine is local"])
    strange = make_model(tmp_path / "strange", {"x": np.ones(3, np.float32)})
    refuse("diff", pair[0], strange, says=["no tensors of the same name and shape"], hint="one architecture")
    adapter, _ = adapter_of(tmp_path / "adapter", 1, Q)
    refuse("diff", adapter, pair[0], says=["is an adapter"], hint="trained on")


def test_models_on_a_web_server(web: Any, modelfuse: Run) -> None:
    for seed, name in enumerate("AB"):
        make_model(web.folder / name, random_tensors(seed), shards=2)
    here = [str(web.folder / name) for name in "AB"]
    said = [modelfuse("diff", *models, "--json") for models in ([f"{web.url}/A", f"{web.url}/B"], here)]
    there, local = (json.loads(each.out) for each in said)
    assert there["tensors"] == local["tensors"] != []


def test_advice_fits_what_was_found(tmp_path: Path) -> None:
    """Gentle experts are added up, strong ones are not; three or more are solved for; nothing without a base."""
    models = ROOT / "demo" / "models"
    two = [models / "code", models / "prose"]
    (sum_up,) = modelfuse_package.diff(*two, base=models / "base", progress=False).advice
    assert sum_up.settings == {"merge_method": "task_arithmetic", "weight_list": [1, 1]}
    weigh, solve = modelfuse_package.diff(*two, models / "arithmetic", base=models / "base", progress=False).advice
    assert solve.settings == {"merge_method": "ridge"}
    assert weigh.settings["weight_list"] == [0.97] * 3
    assert modelfuse_package.diff(models / "base", *two, progress=False).advice == ()
    tensors = {name: np.asarray(each) for name, each in random_tensors(1).items()}
    base = make_model(tmp_path / "base", tensors)
    strong = [
        make_model(tmp_path / str(seed), {name: each + random_tensors(seed)[name] for name, each in tensors.items()})
        for seed in (2, 3)
    ]
    (weigh,) = modelfuse_package.diff(*strong, base=base, progress=False).advice
    assert weigh.settings["weight_list"][0] < 0.1  # type: ignore[operator]
    modelfuse_package.check(
        model_path_list=strong,
        base_model_path=base,
        output_path=tmp_path / "C",
        **weigh.settings,  # type: ignore[arg-type]
    )
    assert modelfuse_package.diff(strong[0], base, base=base, progress=False).advice == ()
