"""Tensors that only some models have, and what is said of models that do not fit together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Said, array, make_model, read_model

import modelfuse

CONFIG = {"model_type": "made-up"}
Shapes = dict[str, tuple[int, ...]]
SHAPES: Shapes = {"model.layers.0.w.weight": (3, 2), "model.layers.1.w.weight": (3, 2), "model.norm.weight": (2,)}
MORE: Shapes = {"mtp.layers.0.w.weight": (3, 2), "mtp.norm.weight": (2,)}
Tensors = dict[str, np.ndarray]


def noise(seed: int, shapes: Shapes) -> Tensors:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def merged(tmp_path: Path, models: list[Path], **settings: Any) -> Tensors:
    modelfuse.merge(model_path_list=models, output_path=tmp_path / "out", overwrite=True, **settings)
    assert modelfuse.verify(tmp_path / "out", full=True).holds
    return {name: array(each) for name, each in read_model(tmp_path / "out").items()}


def trio(tmp_path: Path) -> tuple[list[Path], list[Tensors]]:
    """A and B have more than C."""
    tensors = [noise(1, SHAPES | MORE), noise(2, SHAPES | MORE), noise(3, SHAPES)]
    return [
        make_model(tmp_path / name, each, config=CONFIG) for name, each in zip("ABC", tensors, strict=True)
    ], tensors


def test_copy_merges_those_that_have_it(tmp_path: Path) -> None:
    models, (a, b, c) = trio(tmp_path)
    got = merged(tmp_path, models, missing="copy")
    assert got.keys() == a.keys()
    np.testing.assert_allclose(got["mtp.norm.weight"], (a["mtp.norm.weight"] + b["mtp.norm.weight"]) / 2, rtol=1e-6)
    np.testing.assert_allclose(
        got["model.norm.weight"], sum(each["model.norm.weight"] for each in (a, b, c)) / 3, rtol=1e-6
    )
    plan = modelfuse.check(model_path_list=models, missing=["mtp.*=copy"])
    assert any(f"Not in all models, merged from {models[0]} and {models[1]}: mtp." in note for note in plan.notes)


def test_copy_takes_the_base_s(tmp_path: Path) -> None:
    models, (a, _, _) = trio(tmp_path)
    got = merged(tmp_path, models[1:], base_model_path=models[0], missing=["*=copy"])
    for name in MORE:
        assert got[name].tobytes() == a[name].tobytes()
    got = merged(tmp_path, models[:2], base_model_path=models[2], missing=["mtp.norm.*=copy", "drop"])
    assert got.keys() == {*SHAPES, "mtp.norm.weight"}
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["inputs"][0]["left_out"] == [{"because": "not in every model", "tensors": ["mtp.layers.0.w.weight"]}]


def test_the_first_pattern_counts_and_error_is_the_default(tmp_path: Path, refuse: Callable[..., str]) -> None:
    models, _ = trio(tmp_path)
    words = ["--model_path_list", *models, "--output_path", tmp_path / "out"]
    refuse("merge", *words, says=["not in", "mtp.norm.weight"], hint="--missing 'mtp.*=copy'")
    refuse("merge", *words, "--missing", "mtp.norm.*=error", "copy", says=["mtp.norm.weight"])
    refuse("merge", *words, "--missing", "mtp.*=keep", says=["missing is 'mtp.*=keep'"])
    merged(tmp_path, models, missing=["mtp.*=drop", "*=error"])


def test_what_the_hint_says_works(tmp_path: Path, refuse: Callable[..., str], merge: Callable[..., Said]) -> None:
    import shlex

    models, _ = trio(tmp_path)
    words = ["--model_path_list", *models, "--output_path", tmp_path / "out"]
    said = refuse("merge", *words, hint="--missing")
    given = shlex.split(said.partition("that only some have: ")[2].partition(";")[0])
    merge(*words, *given)


def test_a_text_model_goes_into_the_language_part_of_a_multimodal_one(tmp_path: Path) -> None:
    vision: Shapes = {
        "model.visual.blocks.0.w.weight": (3, 2),
        "model.visual.merger.weight": (2, 2),
    }
    language = {name.replace("model.", "model.language_model."): shape for name, shape in SHAPES.items()}
    base, text = noise(1, language | vision), noise(2, SHAPES)
    paths = [make_model(tmp_path / name, each, config=CONFIG) for name, each in (("V", base), ("T", text))]
    got = merged(tmp_path, [paths[1]], base_model_path=paths[0], missing="copy", merge_method="linear")
    assert got.keys() == base.keys()
    for name in vision:
        assert got[name].tobytes() == base[name].tobytes()
    for name, each in text.items():
        np.testing.assert_allclose(got[name.replace("model.", "model.language_model.")], each, rtol=1e-6)


def test_buffers_that_a_model_computes_need_no_policy(tmp_path: Path) -> None:
    buffers: Tensors = {f"model.layers.0.rotary.{name}": np.ones(4, np.float32)
                        for name in ("cos_cached", "sin_cached", "original_inv_freq", "embed_positions")}  # fmt: skip
    buffers |= {"embeddings.token_type_ids": np.zeros((1, 4), np.int64), "attn.relative_position_index": np.zeros(
        (4, 4), np.int64)}  # fmt: skip
    one = make_model(tmp_path / "A", noise(1, SHAPES) | buffers, config=CONFIG)
    other = make_model(tmp_path / "B", noise(2, SHAPES), config=CONFIG)
    assert merged(tmp_path, [one, other]).keys() == SHAPES.keys()


# --- kinds of mismatch -----------------------------------------------------------------------------------------------


def refused(tmp_path: Path, refuse: Callable[..., str], one: Tensors, other: Tensors) -> str:
    models = [make_model(tmp_path / name, each, config=CONFIG) for name, each in (("A", one), ("B", other))]
    return refuse("check", "--model_path_list", *models, says=["The models do not have the same tensors"])


def test_other_depths(tmp_path: Path, refuse: Callable[..., str]) -> None:
    layers: Shapes = {f"model.layers.{number}.w.weight": (3, 2) for number in range(4)}
    said = refused(tmp_path, refuse, noise(1, layers), noise(2, SHAPES | {"model.norm.weight": (2,)} | layers | {
        "model.layers.4.w.weight": (3, 2), "model.layers.5.w.weight": (3, 2)}) | {})  # fmt: skip
    assert "not in" in said
    said = refused(tmp_path, refuse, noise(1, SHAPES), noise(2, SHAPES | {
        "model.layers.2.w.weight": (3, 2), "model.layers.3.w.weight": (3, 2)}))  # fmt: skip
    assert f"2 layers and 4 (model.layers.2 and 3 only in {tmp_path / 'B'})" in said
    assert "--missing 'model.layers.2.*=drop' 'model.layers.3.*=drop'" in said


def test_weights_that_were_not_gathered(tmp_path: Path, refuse: Callable[..., str]) -> None:
    empty = {name: np.zeros(0, np.float32) for name in SHAPES}
    said = refused(tmp_path, refuse, noise(1, SHAPES), empty)
    assert f"3 of 3 tensors of {tmp_path / 'B'} have the shape [0]: it was saved under ZeRO-3" in said
    assert "zero_to_fp32.py" in said


def test_rows_of_embeddings(tmp_path: Path, refuse: Callable[..., str]) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    rows: list[Shapes] = [dict.fromkeys(names, (count, 2)) for count in (64, 67)]
    said = refused(tmp_path, refuse, noise(1, SHAPES | rows[0]), noise(2, SHAPES | rows[1]))
    assert "Rows 64 and 67: added tokens, or padding" in said
    assert "resize_token_embeddings" in said


def test_an_adapter_inside_a_model(tmp_path: Path, refuse: Callable[..., str]) -> None:
    inside: Shapes = {
        "model.layers.0.w.lora_A.default.weight": (2, 2),
        "model.layers.0.w.lora_B.default.weight": (3, 2),
    }
    said = refused(tmp_path, refuse, noise(1, SHAPES), noise(2, SHAPES | inside))
    assert f"{tmp_path / 'B'} contains tensors of an adapter that is not merged" in said
    assert "merge_and_unload" in said


def test_a_classifier_beside_a_language_model(tmp_path: Path, refuse: Callable[..., str]) -> None:
    said = refused(tmp_path, refuse, noise(1, SHAPES | {"score.weight": (3, 2)}),
                   noise(2, SHAPES | {"lm_head.weight": (9, 2)}))  # fmt: skip
    assert "--missing 'score.*=copy' with 'lm_head.*=drop'" in said


def test_no_hint_where_none_is_known(tmp_path: Path, refuse: Callable[..., str]) -> None:
    said = refused(tmp_path, refuse, noise(1, SHAPES), noise(2, {"a.weight": (2,), "b.weight": (3,)}))
    assert "\nhint:" not in said


@pytest.mark.parametrize("policy", ["copy", "drop"])
def test_an_adapter_as_output(tmp_path: Path, refuse: Callable[..., str], policy: str) -> None:
    models, _ = trio(tmp_path)
    settings = ["--model_path_list", models[0], models[1], "--base_model_path", models[2], "--output_format", "lora",
                "--lora_rank", "2", "--missing", policy, "--output_path", tmp_path / "out"]  # fmt: skip
    if policy == "copy":
        refuse("check", *settings, says=["cannot hold tensors that the base lacks", "mtp.norm.weight"])
    else:
        from modelfuse.cli.main import main

        assert main([*map(str, ["merge", *settings])]) == 0
