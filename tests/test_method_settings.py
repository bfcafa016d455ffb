"""Settings of methods: those that differ by model, the names that people know, λ, and defaults of single methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Said, Stored, array, make_model, random_tensors, read_model, save_file

import modelfuse as package
from modelfuse.checkpoints.input_grams import KIND
from modelfuse.cli.arguments import parse
from modelfuse.methods.registry import METHODS, PARAMETERS
from modelfuse.recipe.method_settings import METHOD_SETTINGS
from modelfuse.recipe.recipe import Recipe

Run = Callable[..., Said]
TWO = {"model_path_list": ["A", "B"], "base_model_path": "C"}
#: Methods that take a base.
WITH_BASE = [name for name, each in METHODS.items() if (each.base or each.combination.base) != "none"]


def taken_by(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with as many models as a method takes, and without a base if it takes none."""
    most = METHODS[method].combination.models[1]
    models = settings["model_path_list"][:most]
    changed = {**settings, "merge_method": method, "model_path_list": models}
    how = METHODS[method].combination.matrix
    if how is not None and how.gram == "given":
        changed["gram_list"] = [f"{model}.grams.safetensors" for model in models]
    return changed if method in WITH_BASE else {**changed, "base_model_path": None}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Any]:
    """Two models and their base, as settings."""
    one, two, base = (make_model(tmp_path / name, random_tensors(seed)) for seed, name in enumerate(("A", "B", "base")))
    for each in (one, two):
        grams = {f"model.layers.{layer}.mlp": np.diag(np.arange(1, 6, dtype=np.float32)) for layer in (0, 1)}
        save_file(each.with_name(f"{each.name}.grams.safetensors"), grams, {"kind": KIND})
    return {"model_path_list": [one, two], "base_model_path": base}


def merged(folder: Path, **settings: Any) -> dict[str, Stored]:
    package.merge(output_path=folder, **settings)
    assert package.verify(folder, full=True).holds
    return read_model(folder)


# One a model

PER_MODEL: dict[str, dict[str, list[float]]] = {
    "trim": {"reserve_p": [0.3, 0.8]},
    "dare": {"reserve_p": [0.3, 0.8]},
    "magprune": {"reserve_p": [0.3, 0.6], "epsilon": [0.2, 0.1]},
    "breadcrumbs": {"reserve_p": [0.3, 0.6], "gamma": [0.2, 0.1]},
}


@pytest.mark.parametrize("tensor_type", ["np", "pt"])
@pytest.mark.parametrize("sparsify", PER_MODEL)
def test_each_model_has_its_own(sparsify: str, tensor_type: str, models: dict[str, Any], tmp_path: Path) -> None:
    """Where only one model has a weight, only its values matter."""
    if tensor_type == "pt":
        pytest.importorskip("torch")
    models |= {"merge_type": "linear", "sparsify_type": sparsify, "tensor_type": tensor_type}
    for number, weights in enumerate(([1, 0], [0, 1])):
        own = {name: values[number] for name, values in PER_MODEL[sparsify].items()}
        alone = merged(tmp_path / f"one for all {number}", **models, **own, weight_list=weights)
        each = merged(tmp_path / f"one a model {number}", **models, **PER_MODEL[sparsify], weight_list=weights)
        assert each == alone


def test_one_for_all_may_be_a_list_and_equal_ones_change_nothing(models: dict[str, Any], tmp_path: Path) -> None:
    models |= {"merge_method": "della"}
    usual = merged(tmp_path / "usual", **models, reserve_p=0.4, epsilon=0.3)
    assert merged(tmp_path / "list of one", **models, reserve_p=[0.4], epsilon=[0.3]) == usual
    assert merged(tmp_path / "one a model", **models, reserve_p=[0.4, 0.4], epsilon=[0.3, 0.3]) == usual
    record = json.loads((tmp_path / "one a model" / "merge_config.json").read_text())
    assert (record["reserve_p"], record["epsilon"]) == ([0.4, 0.4], [0.3, 0.3])
    assert json.loads((tmp_path / "list of one" / "merge_config.json").read_text())["reserve_p"] == 0.4


def test_ones_of_a_model_in_flags_and_rules() -> None:
    settings, _ = parse(["--model_path_list", "A", "B", "--merge_method", "ties", "--reserve_p", "0.5", "0.2"])
    assert Recipe.parse(settings).parameters["reserve_p"] == (0.5, 0.2)
    assert parse(["--density=0.5,0.2"])[0] == {"reserve_p": ["0.5", "0.2"]}
    recipe = Recipe.parse({**TWO, "rules": [{"tensors": "*", "merge_method": "ties", "reserve_p": [0.5, 0.2]}]})
    assert recipe.parameters_of(recipe.rules[0])["reserve_p"] == (0.5, 0.2)


def test_a_recipe_behind_numbers_is_none_of_them(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text('{"merge_method": "ties"}')
    assert parse(["--reserve_p", "0.5", str(path)])[0] == {"merge_method": "ties", "reserve_p": "0.5"}
    assert parse([str(path), "--reserve_p", "0.5", "0.2"])[0]["reserve_p"] == ["0.5", "0.2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reserve_p": [0.5, 0.5, 0.5]}, "reserve_p has 3 values for 2 models"),
        ({"reserve_p": []}, "reserve_p has 0 values for 2 models"),
        ({"reserve_p": [0.5, 7]}, "reserve_p is 7"),
        ({"reserve_p": {"A": 0.5}}, "reserve_p is"),
        ({"merge_method": "della", "reserve_p": [0.5, 0.99]}, "both must lie between 0 and 1"),
        ({"slerp_alpha": [0.5, 0.5]}, "slerp_alpha is"),
        ({"rules": [{"tensors": "*.mlp.*", "epsilon": [0.1] * 3}]}, r"Rule 1 \('\*.mlp.\*'\): epsilon has 3 values"),
    ],
)
def test_lists_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(package.RecipeError, match=message):
        Recipe.parse({**TWO, "merge_method": "ties", **settings})


def test_some_of_the_models_keep_their_own() -> None:
    """Where a tensor is of some models only: their values, weights relative to each other, their draws."""
    settings = {**TWO, "model_path_list": ["A", "B", "C"], "merge_method": "dare_linear"}
    recipe = Recipe.parse({**settings, "reserve_p": [0.1, 0.2, 0.3], "weight_list": [1, 2, 3], "normalize": True})
    some = recipe.parameters.applied((0, 2), recipe.seed)
    assert (some.weights, some.streams) == ((0.25, 0.75), (0, 2))
    assert [some.of(model).reserve_p for model in range(2)] == [0.1, 0.3]
    assert Recipe.parse(settings).parameters.applied((1, 2), 0).weights == (0.5, 0.5)


# Names that people know


def test_other_names_of_settings() -> None:
    recipe = Recipe.parse({**TWO, "merge_method": "ties", "density": 0.25, "lambda": 0.5})
    assert recipe.effective()["reserve_p"] == 0.25
    assert recipe == Recipe.parse({**TWO, "merge_method": "ties", "reserve_p": 0.25, "lambda_": 0.5})
    assert Recipe.parse({**TWO, "merge_method": "slerp", "t": 0.25}).parameters["slerp_alpha"] == 0.25
    ruled = Recipe.parse({**TWO, "rules": [{"tensors": "*", "merge_method": "slerp", "t": 0.25}]})
    assert ruled.rules[0].own == (("merge_method", "slerp"), ("slerp_alpha", 0.25))
    with pytest.raises(package.RecipeError, match="The setting reserve_p is given twice"):
        Recipe.parse({**TWO, "density": 0.25, "reserve_p": 0.25})


def test_they_are_told_in_help(modelfuse: Run) -> None:
    said = " ".join(modelfuse("merge", "--help").out.split())
    assert "Also called density." in said
    assert "Also called t." in said
    assert "--lambda N" in said
    assert "One for all, or one per model." in said
    assert "Default: true; false for breadcrumbs; false for breadcrumbs_ties." in said
    assert "task_arithmetic" in said


def test_task_arithmetic_is_linear_with_a_base(models: dict[str, Any], tmp_path: Path) -> None:
    usual = merged(tmp_path / "linear", **models, merge_method="linear", weight_list=[0.5, 0.7])
    assert merged(tmp_path / "named", **models, merge_method="task_arithmetic", weight_list=[0.5, 0.7]) == usual
    models.pop("base_model_path")
    with pytest.raises(package.RecipeError, match="task_arithmetic acts on differences to a base"):
        Recipe.parse({**models, "merge_method": "task_arithmetic"})
    with pytest.raises(package.RecipeError, match=r"Rule 1 \('\*'\): task_arithmetic acts on differences to a base"):
        Recipe.parse({**models, "rules": [{"tensors": "*", "merge_method": "task_arithmetic"}]})


# λ


@pytest.mark.parametrize("tensor_type", ["np", "pt"])
@pytest.mark.parametrize("method", WITH_BASE)
def test_lambda_multiplies_the_difference(
    method: str, tensor_type: str, models: dict[str, Any], tmp_path: Path
) -> None:
    if tensor_type == "pt":
        pytest.importorskip("torch")
    models = {**taken_by(method, models), "tensor_type": tensor_type, "output_dtype": "float64"}
    usual, half = (merged(tmp_path / name, **models, lambda_=factor) for name, factor in (("usual", 1), ("half", 0.5)))
    base, none = read_model(models["base_model_path"]), merged(tmp_path / "none", **models, lambda_=0)
    # Methods of whole matrices take the mean of all that is no matrix of a layer, and that is what it is.
    averaged = {name for name in usual if METHODS[method].combination.matrix is not None and ".layers." not in name}
    for name in usual:
        one, other, zero, start = (array(each[name]).astype(np.float64) for each in (usual, half, none, base))
        if name in averaged:
            assert np.array_equal(one, other)
        else:
            assert np.allclose(other - start, (one - start) / 2, atol=1e-6), name
            assert np.array_equal(zero, start)


def test_lambda_of_some_tensors_and_of_one_model(models: dict[str, Any], tmp_path: Path) -> None:
    """A single model of weight one is taken as it is, but for λ."""
    models["model_path_list"] = models["model_path_list"][:1]
    found = merged(tmp_path / "C", **models, rules=[{"tensors": "*.mlp.*", "lambda": 0.5}])
    own, base = read_model(models["model_path_list"][0]), read_model(models["base_model_path"])
    for name in own:
        if ".mlp." in name:
            middle = (array(own[name]) + array(base[name])) / 2
            assert np.allclose(array(found[name]), middle, atol=1e-6)
        else:
            assert found[name] == own[name]
    report = json.loads((tmp_path / "C" / "merge_report.json").read_text())
    assert [each.get("lambda") for each in report["methods"]] == [0.5]


def test_lambda_needs_a_base() -> None:
    with pytest.raises(package.RecipeError, match=r"lambda is 0\.5, a factor on differences to a base") as caught:
        Recipe.parse({"model_path_list": ["A", "B"], "lambda": 0.5})
    assert caught.value.hint
    assert Recipe.parse({"model_path_list": ["A", "B"], "lambda": 1})


# Defaults of methods


def test_a_method_has_defaults_of_its_own() -> None:
    def rescale(**settings: Any) -> object:
        recipe = Recipe.parse({**TWO, **settings})
        record = Recipe.parse(recipe.effective())
        assert record.effective() == recipe.effective()
        assert record.method == recipe.method
        return recipe.effective()["rescale"]

    assert rescale(merge_method="ties") is True
    assert rescale(merge_method="breadcrumbs") is False
    assert rescale(merge_method="breadcrumbs", rescale=True) is True
    assert rescale(merge_type="linear", sparsify_type="breadcrumbs") is True
    recipe = Recipe.parse({**TWO, "merge_method": "ties", "rules": [{"tensors": "*", "merge_method": "breadcrumbs"}]})
    assert recipe.parameters_of(recipe.rules[0])["rescale"] is False
    given = recipe.parameters.overridden({"merge_method": "breadcrumbs", "rescale": True})
    assert given["rescale"] is True


def test_weights_that_a_method_does_not_divide_by() -> None:
    """Absent ones are equal and sum to one, whether or not the agreeing ones are divided by."""
    for method, divides in (("ties", True), ("breadcrumbs_ties", False)):
        recipe = Recipe.parse({**TWO, "merge_method": method})
        for each in (recipe, Recipe.parse(recipe.effective())):
            assert each.weights == (0.5, 0.5)
            assert each.method.shared.normalize is divides
            assert each.method.weights == ((1.0, 1.0) if divides else (0.5, 0.5))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_recorded_so_that_it_comes_back(method: str) -> None:
    recipe = Recipe.parse(taken_by(method, TWO))
    again = Recipe.parse(json.loads(json.dumps(recipe.effective())))
    assert again.effective() == recipe.effective()
    assert again.method == recipe.method


def test_every_declared_setting_is_one_of_the_recipe() -> None:
    assert PARAMETERS.keys() <= METHOD_SETTINGS.keys()
    assert all(each.description for each in METHOD_SETTINGS.values())


def test_bases_and_models_that_a_method_takes() -> None:
    with pytest.raises(package.RecipeError, match="breadcrumbs acts on differences to a base"):
        Recipe.parse({"model_path_list": ["A", "B"], "merge_method": "breadcrumbs"})
    with pytest.raises(package.RecipeError, match="model_stock merges at least two models, 1 is given"):
        Recipe.parse({**TWO, "model_path_list": ["A"], "merge_method": "model_stock"})
    with pytest.raises(package.RecipeError, match="model_stock takes no weight_list"):
        Recipe.parse({**TWO, "merge_method": "model_stock", "weight_list": [1, 2]})


@pytest.mark.parametrize("method", METHODS)
def test_a_method_reads_the_same_in_every_process(method: str) -> None:
    """A merge that was ended goes on by what its computed tensors are made of, methods included."""
    assert " at 0x" not in repr(Recipe.parse(taken_by(method, TWO)).method)
