"""Rules: tensors whose names match a glob have a method, parameters or an input of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapting import UP, Q, adapter_of, make_base
from conftest import Said, Stored, bf16, make_model, read_file, read_model

import modelfuse as package
from modelfuse.planning.warnings import warnings_of
from modelfuse.recipe.recipe import Recipe

Run = Callable[..., Said]
Rules = list[dict[str, Any]]

ATTENTION, MLP, NORM = (f"model.layers.{{}}.{part}.weight" for part in ("self_attn.q_proj", "mlp.up_proj", "norm"))
EMBEDDING = "model.embed_tokens.weight"


def tensors_of(seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (11, 4)}
    for layer in range(2):
        shapes |= {ATTENTION.format(layer): (4, 4), MLP.format(layer): (9, 4), NORM.format(layer): (4,)}
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Any]:
    """Two models and their base, as settings."""
    one, two, base = (make_model(tmp_path / name, tensors_of(seed)) for seed, name in enumerate(("one", "two", "base")))
    return {"model_path_list": [one, two], "base_model_path": base}


def merged(folder: Path, **settings: Any) -> dict[str, Stored]:
    package.merge(output_path=folder, overwrite=True, **settings)
    return read_model(folder)


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "merge_report.json").read_text())
    return report


OTHERS: dict[str, dict[str, Any]] = {
    "weights": {"weight_list": [0.9, 0.1]},
    "normalized weights": {"weight_list": [3, 1], "normalize": True},
    "ties": {"merge_method": "ties", "reserve_p": 0.4},
    "della": {"merge_method": "della", "reserve_p": 0.5, "epsilon": 0.2, "rescale": False},
    "dare": {"merge_type": "linear", "sparsify_type": "dare", "reserve_p": 0.3},
    "slerp": {"merge_method": "slerp", "slerp_alpha": 0.25},
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("has_base", [True, False], ids=["base", "no base"])
def test_a_rule_gives_the_bytes_of_a_recipe_with_its_settings(
    other: str, has_base: bool, models: dict[str, Any], tmp_path: Path
) -> None:
    """Draws included: they depend on the seed, the model, the tensor and the element only."""
    if not has_base:
        models.pop("base_model_path")
    rules = [{"tensors": "*.mlp.*", **OTHERS[other]}]
    usual = merged(tmp_path / "usual", **models, merge_method="dare_ties", seed=5)
    own = OTHERS[other] if "merge_type" in OTHERS[other] else {"merge_method": "dare_ties", **OTHERS[other]}
    wanted = merged(tmp_path / "other", **models, **own, seed=5)
    found = merged(tmp_path / "ruled", **models, merge_method="dare_ties", seed=5, rules=rules)
    assert found == {name: (wanted if ".mlp." in name else usual)[name] for name in usual}
    assert wanted[MLP.format(0)] != usual[MLP.format(0)]


def test_the_first_rule_that_matches_holds(models: dict[str, Any], tmp_path: Path) -> None:
    rules = [
        {"tensors": "*.layers.0.*norm*", "take": 2},
        {"tensors": "*.layers.0.*", "weight_list": [1, 0]},
        {"tensors": "*", "weight_list": [0, 1]},
    ]
    found = package.check(**models, rules=rules)
    assert {tensor.name: tensor.rule for tensor in found.tensors} == {
        EMBEDDING: 2,
        **{name.format(0): 0 if name == NORM else 1 for name in (ATTENTION, MLP, NORM)},
        **{name.format(1): 2 for name in (ATTENTION, MLP, NORM)},
    }
    weights = {tensor.name: tensor.method and tensor.method.weights for tensor in found.tensors}
    assert weights[MLP.format(0)] == (1.0, 0.0)
    assert weights[MLP.format(1)] == (0.0, 1.0)
    assert weights[NORM.format(0)] is None


@pytest.mark.parametrize("take", ["path", "number"])
def test_tensors_are_taken_as_they_are(take: str, models: dict[str, Any], tmp_path: Path) -> None:
    """In their own type, too, and of an input that alone has them, or in that shape."""
    tensors = tensors_of(1)
    tensors |= {NORM.format(0): bf16(tensors[NORM.format(0)]), NORM.format(1): np.ones(7, np.float32),
                "extra_norm.weight": np.ones(3, np.float32), "steps_norm.weight": np.arange(3)}  # fmt: skip
    two = make_model(tmp_path / "two", tensors)
    rules = [{"tensors": "*norm.weight", "take": str(two) if take == "path" else 2}]
    stored, usual = read_model(two), merged(tmp_path / "usual", **{**models, "model_path_list": [tmp_path / "one"] * 2})
    found = merged(tmp_path / "ruled", **models, rules=rules)
    assert found.keys() == stored.keys()
    assert {name: each for name, each in found.items() if "norm" in name} == {
        name: each for name, each in stored.items() if "norm" in name
    }
    assert {name for name in found if "norm" not in name} == {name for name in usual if "norm" not in name}
    entry = report_of(tmp_path / "ruled")["tensors"][NORM.format(0)]
    assert (entry["action"], entry["rule"], entry["inputs"]) == ("taken", 1, [2])
    assert package.verify(tmp_path / "ruled", full=True).holds


def test_the_base_can_be_taken(models: dict[str, Any], tmp_path: Path) -> None:
    for take in (3, models["base_model_path"]):
        found = merged(tmp_path / "ruled", **models, rules=[{"tensors": "*.embed*", "take": take}])
        assert found[EMBEDDING] == read_model(models["base_model_path"])[EMBEDDING]


def test_what_is_taken_must_be_there(models: dict[str, Any], tmp_path: Path) -> None:
    tensors = tensors_of(1)
    tensors.pop(NORM.format(1))
    make_model(tmp_path / "two", tensors)
    with pytest.raises(package.MismatchError, match=r"not in .*two: model\.layers\.1\.norm\.weight"):
        package.check(**models, rules=[{"tensors": "*norm.weight", "take": 2}])
    assert package.check(**models, rules=[{"tensors": "*norm.weight", "take": 1}])


@pytest.mark.parametrize("sparsify", [None, "trim"])
def test_the_record_gives_the_same_bytes_and_the_same_record(
    sparsify: str | None, models: dict[str, Any], tmp_path: Path
) -> None:
    """Also where a rule leaves to the recipe what the recipe leaves to defaults."""
    rules: Rules = [
        {"tensors": "*.self_attn.*", "weight_list": [0.9, 0.1]},
        {"tensors": "*.mlp.*", "merge_method": "ties", "reserve_p": 0.5},
        {"tensors": "*.0.norm.*", "merge_method": "slerp"},
        {"tensors": "*norm.weight", "take": str(models["model_path_list"][1])},
    ]
    found = merged(tmp_path / "ruled", **models, rules=rules, sparsify_type=sparsify, weight_list=[2, 1])
    record = json.loads((tmp_path / "ruled" / "merge_config.json").read_text())
    recipe = Recipe.parse(record)
    assert {**recipe.effective(), "modelfuse_version": package.__version__} == record
    settings = {name: value for name, value in record.items() if name not in ("output_path", "overwrite")}
    assert merged(tmp_path / "again", **settings) == found
    assert package.verify(tmp_path / "ruled", full=True).holds


def test_without_rules_the_record_names_none(models: dict[str, Any]) -> None:
    assert "rules" not in Recipe.parse(models).effective()


def test_the_report_tells_methods_and_rules(models: dict[str, Any], tmp_path: Path) -> None:
    rules: Rules = [{"tensors": "*.mlp.*", "merge_method": "ties", "reserve_p": 0.5}]
    merged(tmp_path / "ruled", **models, rules=rules, weight_list=[0.5, 0.5])
    report = report_of(tmp_path / "ruled")
    assert report["method"]["merge_type"] == "linear"
    assert report["methods"] == [
        {"merge_type": "linear", "sparsify_type": None, "weights": [0.5, 0.5], "normalize": False},
        {"merge_type": "ties", "sparsify_type": "trim", "weights": [0.5, 0.5], "ties_elect_type": "sum",
         "normalize": False, "reserve_p": 0.5, "rescale": True},
    ]  # fmt: skip
    assert [rule["tensors"] for rule in report["rules"]] == ["*.mlp.*"]
    for name, entry in report["tensors"].items():
        assert (entry["method"], entry.get("rule")) == ((2, 1) if ".mlp." in name else (1, None))


def test_another_rule_than_reported_is_found(models: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "ruled"
    merged(folder, **models, rules=[{"tensors": "*.mlp.*", "weight_list": [0.9, 0.1]}])
    record = json.loads((folder / "merge_config.json").read_text())
    record["rules"][0]["weight_list"] = [0.8, 0.1]
    (folder / "merge_config.json").write_text(json.dumps(record))
    problems = package.verify(folder).problems
    assert any("gives other methods than merge_report.json" in each.message for each in problems)
    record["rules"][0]["tensors"] = "*.self_attn.*"
    (folder / "merge_config.json").write_text(json.dumps(record))
    named = {each.tensor for each in package.verify(folder).problems if "another method" in each.message}
    assert named == {name.format(layer) for name in (ATTENTION, MLP) for layer in range(2)}


def test_check_shows_what_each_rule_took(modelfuse: Run, models: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    one, two = models["model_path_list"]
    recipe.write_text(
        f"model_path_list: [{one}, {two}]\nrules:\n"
        "  - tensors: '*.mlp.*'\n    merge_method: ties\n    reserve_p: 0.5\n"
        f"  - tensors: '*norm.weight'\n    take: {two}\n"
        "  - tensors: 'model.layers.1.mlp.*'\n    weight_list: [1, 0]\n"
        "  - tensors: '*.experts.*'\n    weight_list: [1, 0]\n"
    )
    said = modelfuse("check", recipe)
    assert said.status == 0, said.err
    lines = {line.split()[0]: line.split() for line in said.out.splitlines() if line[:1].isdigit()}
    assert lines["1"][1:6] == ["*.mlp.*", "ties:", "reserve_p", "0.5", "2"]
    assert lines["2"][1:6] == ["*norm.weight", "as", "in", str(two), "2"]
    assert lines["3"][-2:] == lines["4"][-2:] == ["0", "–"]
    assert "Rule 3 ('model.layers.1.mlp.*') applies to no tensor: earlier rules apply to all 1 that it" in said.out
    assert "Rule 4 ('*.experts.*') applies to no tensor: no name matches." in said.out
    assert [line.split()[-1] for line in said.out.splitlines() if line.startswith(("merge ", "take "))] == [
        "–", "–", "1", "2",
    ]  # fmt: skip


def test_a_rule_that_drops_weights_without_a_base_warns(models: dict[str, Any]) -> None:
    models.pop("base_model_path")
    rules: Rules = [{"tensors": "*norm*", "take": 1}, {"tensors": "*.mlp.*", "merge_method": "dare_linear"}]
    (warning,) = warnings_of(Recipe.parse({**models, "rules": rules}))
    assert warning.startswith("Rule 2 ('*.mlp.*'): dare without base_model_path drops parts")


WRONG: dict[str, tuple[object, str]] = {
    "no list": ("x", "give a list"),
    "no map": (["x"], "give a map with tensors"),
    "no glob": ([{"weight_list": [1, 2]}], "tensors should be a glob"),
    "glob of a number": ([{"tensors": 3, "weight_list": [1, 2]}], "tensors should be a glob"),
    "nothing": ([{"tensors": "*"}], "it changes nothing"),
    "unknown": (
        [{"tensors": "*", "reserve": 1}],
        "there is no setting 'reserve' of methods. Did you mean 'reserve_p'?",
    ),
    "not of methods": ([{"tensors": "*", "n_process": 1}], "there is no setting 'n_process' of methods"),
    "out of range": ([{"tensors": "*.mlp.*", "reserve_p": 7}], "rules is {'tensors': '\\*.mlp.\\*'.*reserve_p is 7: "),
    "twice": ([{"tensors": "*", "reserve_p": 0.5, "reserve-p": 0.6}], "a setting is given twice"),
    "take and method": ([{"tensors": "*", "take": 1, "reserve_p": 0.5}], "what is taken as it is has no method"),
    "take true": ([{"tensors": "*", "take": True}], "give a model's path or number"),
    "take of a list": ([{"tensors": "*", "take": [1]}], "input is not a valid path"),
    "take another": ([{"tensors": "*", "take": "elsewhere"}], r"Rule 1 \('\*'\): take is .*elsewhere, which is none"),
    "take 0": ([{"tensors": "*", "take": 0}], "take is 0, but there are 3 inputs"),
    "take 4": ([{"tensors": "*", "take": 4}], "take is 4, but there are 3 inputs"),
    "weights": (
        [{"tensors": "*", "take": 1}, {"tensors": "*.mlp.*", "weight_list": [1]}],
        r"Rule 2 \('\*.mlp.\*'\): weight_list has 1 weights for 2 models",
    ),
    "steps": (
        [{"tensors": "*", "merge_method": "ties", "sparsify_type": "dare"}],
        r"Rule 1 .*ties means sparsify_type",
    ),
    "slerp": (
        [{"tensors": "*", "merge_method": "slerp", "weight_list": [1, 2]}],
        "Rule 1 .*slerp takes no weight_list",
    ),
    "magprune": ([{"tensors": "*", "merge_method": "della", "reserve_p": 0.99}], "Rule 1 .*must lie between 0 and 1"),
    "sum of zero": ([{"tensors": "*", "weight_list": [1, -1], "normalize": True}], "Rule 1 .*sums to zero"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_rules_that_cannot_be(wrong: str, models: dict[str, Any]) -> None:
    rules, message = WRONG[wrong]
    with pytest.raises(package.RecipeError, match=message) as caught:
        Recipe.parse({**models, "rules": rules})
    assert caught.value.hint


def test_slerp_by_a_rule_wants_two_models(models: dict[str, Any]) -> None:
    models["model_path_list"] *= 2
    with pytest.raises(package.RecipeError, match=r"Rule 1 .*slerp merges exactly two models, 4 are given"):
        Recipe.parse({**models, "rules": [{"tensors": "*norm*", "merge_method": "slerp"}]})


def test_a_rule_inherits_what_it_does_not_name(models: dict[str, Any]) -> None:
    def parameters(own: dict[str, Any], **settings: Any) -> Any:
        recipe = Recipe.parse({**models, **settings, "rules": [{"tensors": "*", **own}]})
        return recipe.parameters_of(recipe.rules[0])

    assert parameters({"sparsify_type": "trim"}, merge_method="linear").steps == ("trim", "linear")
    assert parameters({"sparsify_type": None}, merge_method="ties").steps == (None, "ties")
    assert parameters({"merge_type": "linear"}, merge_method="ties").steps == ("trim", "linear")
    assert parameters({"merge_method": "linear"}, merge_type="ties", sparsify_type="dare").steps == (None, "linear")
    assert parameters({"merge_method": "ties"}, reserve_p=0.3)["reserve_p"] == 0.3
    assert parameters({"weight_list": None}, weight_list=[1, 2]).weights((0, 1)) == (0.5, 0.5)
    assert parameters({"normalize": True}, weight_list=[1, 3]).weights((0, 1)) == (0.25, 0.75)
    assert parameters({"merge_method": "slerp"}, weight_list=[1, 3])["weight_list"] is None


def test_rules_of_an_adapter_s_tensors(tmp_path: Path) -> None:
    """Globs are over the base's names; both ways to store the result hold the same difference."""
    base, _ = make_base(tmp_path / "base")
    adapters = [adapter_of(tmp_path / f"lora-{seed}", seed, Q, UP)[0] for seed in (1, 2)]
    settings: dict[str, Any] = {"model_path_list": adapters, "base_model_path": base}
    rules: Rules = [{"tensors": "*q_proj*", "weight_list": [0.9, 0.1]}, {"tensors": "*up_proj*", "take": 2}]
    full = merged(tmp_path / "full", **settings, rules=rules)
    alone = merged(tmp_path / "alone", **{**settings, "model_path_list": adapters[1:]})
    assert {name: full[name] for name in full if "up_proj" in name} == {
        name: alone[name] for name in alone if "up_proj" in name
    }
    package.merge(output_path=tmp_path / "lora", output_format="lora", **settings, rules=rules)
    stored = read_file(tmp_path / "lora" / "adapter_model.safetensors")[0]
    report = report_of(tmp_path / "lora")
    assert {entry["rule"] for name, entry in report["tensors"].items() if "q_proj" in name} == {1}
    assert {entry["rule"] for name, entry in report["tensors"].items() if "up_proj" in name} == {2}
    ranks = {name: each.shape[0] for name, each in stored.items() if "lora_A" in name}
    assert {rank for name, rank in ranks.items() if "q_proj" in name} == {4}
    assert {rank for name, rank in ranks.items() if "up_proj" in name} == {2}
    assert package.verify(tmp_path / "lora", full=True).holds
    assert package.verify(tmp_path / "full", full=True).holds
    again = merged(tmp_path / "again", model_path_list=[tmp_path / "lora"], base_model_path=base)
    for name in full:
        one, other = (np.frombuffer(each[name].data, np.float32) for each in (full, again))
        assert np.allclose(one, other, atol=1e-6), name
