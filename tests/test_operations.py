"""What comes after the recipe looks at operations only: tensors of other names, of some inputs, by any method."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Said, array, make_model, read_model
from definitions import applied, merge_tensor
from test_resume import Written

import modelfuse as package
from modelfuse.checkpoints import Checkpoint
from modelfuse.methods.applied import Applied
from modelfuse.methods.registry import apply
from modelfuse.planning import plan as planning
from modelfuse.planning.operations import Operation, merged, method_numbers, methods_of, taken

Run = Callable[..., Said]
SHAPES = {"embed.weight": (7, 4), **{f"layers.{layer}.weight": (300, 40) for layer in range(3)}, "ids": (5,)}
LINEAR = applied("linear", None, (0.25, 0.75))
TRIM = applied("linear", "trim", (1.0,), reserve_p=0.4)
TIES = applied("ties", "dare", (1.0, 0.5), reserve_p=0.6, seed=3)


def tensors_of(seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    return {name: np.arange(5) if name == "ids" else draw.standard_normal(shape).astype(np.float32)
            for name, shape in SHAPES.items()}  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> list[dict[str, Any]]:
    """Two models and a base, whose tensors these are."""
    made = [tensors_of(seed) for seed in range(3)]
    for name, tensors in zip(("A", "B", "base"), made, strict=True):
        make_model(tmp_path / name, tensors)
    return made


@pytest.fixture
def settings(models: list[dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    return {"model_path_list": [tmp_path / "A", tmp_path / "B"], "base_model_path": tmp_path / "base",
            "output_path": tmp_path / "C"}  # fmt: skip


def stacked(models: Sequence[Checkpoint]) -> list[Operation]:
    """Five layers of three: each of its own sources, by its own method."""
    one, two, base = models

    def merge(name: str, sources: list[tuple[int, str]], method: Applied, has_base: bool = False) -> Operation:
        found = tuple(models[number][own] for number, own in sources)
        return merged(name, found, tuple(number for number, _ in sources), method, has_base=has_base)

    return [
        merge("embed.weight", [(1, "embed.weight"), (2, "embed.weight")], TRIM, has_base=True),
        merge("layers.0.weight", [(0, "layers.0.weight"), (1, "layers.2.weight")], LINEAR),
        taken("layers.1.weight", one["layers.0.weight"], 0),
        merge("layers.2.weight", [(1, "layers.1.weight"), (0, "layers.0.weight"), (2, "layers.2.weight")], TIES, True),
        taken("layers.3.weight", base["layers.2.weight"], 2),
        merge("layers.4.weight", [(1, "layers.2.weight"), (2, "layers.0.weight")], TRIM, has_base=True),
        taken("ids", two["ids"], 1),
    ]


def expected(models: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    one, two, base = models
    layers = [f"layers.{layer}.weight" for layer in range(5)]
    return {
        "embed.weight": merge_tensor([two["embed.weight"]], base["embed.weight"], TRIM, "embed.weight"),
        layers[0]: merge_tensor([one[layers[0]], two[layers[2]]], None, LINEAR, layers[0]),
        layers[1]: one[layers[0]],
        layers[2]: merge_tensor([two[layers[1]], one[layers[0]]], base[layers[2]], TIES, layers[2]),
        layers[3]: base[layers[2]],
        layers[4]: merge_tensor([two[layers[2]]], base[layers[0]], TRIM, layers[4]),
        "ids": two["ids"],
    }


@pytest.fixture(autouse=True)
def _stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever decides what each tensor is made of, here it is a list."""
    monkeypatch.setattr(planning, "operations_of", lambda recipe, rules, models, *more: stacked(models))


@pytest.mark.parametrize("tensor_type", ["np", "pt", "pd"])
def test_any_sources_and_methods(
    tensor_type: str, settings: dict[str, Any], models: list[dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip({"np": "numpy", "pt": "torch", "pd": "paddle"}[tensor_type])
    result = package.merge(**settings, tensor_type=tensor_type, n_process=2)
    found, wanted = read_model(tmp_path / "C"), expected(models)
    assert list(found) == list(wanted)
    for name in wanted:
        assert array(found[name]).tobytes() == wanted[name].tobytes(), name
    assert (result.merged, result.copied) == (4, 3)
    assert package.verify(tmp_path / "C", full=True).holds


def test_the_account_of_them(settings: dict[str, Any], tmp_path: Path) -> None:
    package.merge(**settings)
    report = json.loads((tmp_path / "C" / "merge_report.json").read_text())
    assert [(each["merge_type"], each["sparsify_type"]) for each in report["methods"]] == [
        ("linear", "trim"), ("linear", None), ("ties", "dare"),
    ]  # fmt: skip
    told = {name: [entry.get(key) for key in ("method", "inputs", "source_names")]
            for name, entry in report["tensors"].items()}  # fmt: skip
    assert told == {
        "embed.weight": [1, [2, 3], None],
        "layers.0.weight": [2, [1, 2], ["layers.0.weight", "layers.2.weight"]],
        "layers.1.weight": [None, [1], ["layers.0.weight"]],
        "layers.2.weight": [3, [2, 1, 3], ["layers.1.weight", "layers.0.weight", "layers.2.weight"]],
        "layers.3.weight": [None, [3], ["layers.2.weight"]],
        "layers.4.weight": [1, [2, 3], ["layers.2.weight", "layers.0.weight"]],
        "ids": [None, [2], None],
    }


def test_distances_are_counted_for_the_model_that_a_source_is_of(
    settings: dict[str, Any], models: list[dict[str, Any]], tmp_path: Path
) -> None:
    """B is far from the base in one tensor of three; A has one, which cannot be far from the others."""
    tensors = models[1]
    base = models[2]
    for name, start in (("embed.weight", "embed.weight"), ("layers.1.weight", "layers.2.weight")):
        tensors[name] = base[start] * np.float32(1.001)
    make_model(tmp_path / "B", tensors)
    (found,) = package.merge(**settings).suspicious
    assert (found.path, found.tensors, list(found.far)) == (tmp_path / "B", 3, ["layers.4.weight"])


def test_values_that_are_not_finite_are_blamed_on_their_input(
    settings: dict[str, Any], models: list[dict[str, Any]], tmp_path: Path
) -> None:
    models[0]["layers.0.weight"][3, 3] = np.nan
    make_model(tmp_path / "A", models[0])
    with pytest.raises(package.CheckpointError, match=r"NaN or infinite values: 1 in \S*/A, of"):
        package.merge(**settings)


def test_it_goes_on_where_it_was_ended(
    settings: dict[str, Any], models: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Written(monkeypatch)
    written.begin(end_after=3)
    with pytest.raises(KeyboardInterrupt):
        package.merge(**settings)
    written.begin()
    package.merge(**settings)
    assert len(written.slices) == len(SHAPES) + 2 - 3
    found = read_model(tmp_path / "C")
    assert all(array(found[name]).tobytes() == each.tobytes() for name, each in expected(models).items())


def test_memory_is_that_of_the_operations(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    counting = package.check(**settings).memory
    plain = lambda recipe, rules, models, *more: [each for each in stacked(models) if each.method is not TRIM]  # noqa: E731
    monkeypatch.setattr(planning, "operations_of", plain)
    assert package.check(**settings).memory < counting


def test_less_is_done_where_less_gives_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    one, _, base = package.check(**settings).models
    equal, other = base["embed.weight"], one["embed.weight"]
    whole = apply(None, LINEAR.combination, (1.0,), {})
    assert merged("x", (equal, equal), (0, 2), LINEAR, has_base=True).action == "take"
    assert merged("x", (other, equal), (0, 2), whole, has_base=True).inputs == (0,)
    assert merged("x", (other,), (0,), whole, has_base=False).action == "take"
    halved = apply(None, LINEAR.combination, (1.0,), {}, factor=0.5)
    assert merged("x", (other, equal), (0, 2), halved, has_base=True).action == "merge"
    assert merged("x", (other, equal), (0, 2), TRIM, has_base=True).action == "merge"


def test_methods_are_numbered_once(settings: dict[str, Any]) -> None:
    tensors = package.check(**settings).tensors
    assert methods_of(tensors) == [TRIM, LINEAR, TIES]
    assert [method_numbers(tensors).get(id(each.method)) for each in tensors] == [1, 2, None, 3, None, 1, None]
