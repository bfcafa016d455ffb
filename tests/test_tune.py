"""Settings searched by evaluating merges."""

from __future__ import annotations

import csv
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapting import DOWN, Q, adapter_of, make_base
from conftest import ROOT, Said, array, make_model, read_model, snapshot, start

import modelfuse as package
from modelfuse.cli.tune_command import parse_tune
from modelfuse.errors import EvaluationError, ModelfuseError, OutputError, RecipeError
from modelfuse.execution.tuning import merged_folders
from modelfuse.execution.tuning.evaluation import numbers_in
from modelfuse.execution.tuning.layer_groups import find_groups
from modelfuse.execution.tuning.marks import read_space
from modelfuse.execution.tuning.perplexity import Perplexity

pytestmark = pytest.mark.skipif(
    any(__import__("importlib.util").util.find_spec(each) is None for each in ("optuna", "cmaes")),
    reason="the extra tune is not installed",
)
Run = Callable[..., Said]
CONFIG = {"model_type": "llama", "num_hidden_layers": 4, "tie_word_embeddings": False}
PARTS = {"self_attn.q_proj": (6, 4), "mlp.up_proj": (6, 4), "input_layernorm": (4,)}
SHAPES = {
    **{f"model.layers.{layer}.{part}.weight": shape for layer in range(4) for part, shape in PARTS.items()},
    "model.embed_tokens.weight": (9, 4),
    "model.norm.weight": (4,),
}
#: What is looked for: other shares of the models' changes in attention than elsewhere.
WANTED = {True: (0.9, 0.1), False: (0.2, 0.7)}
EVALUATE = """
import json, struct, sys, time
from pathlib import Path
import numpy as np
def read(folder):
    content = (Path(folder) / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    return {name: np.frombuffer(content[8 + length :][slice(*each["data_offsets"])], np.float32)
            for name, each in header.items() if name != "__metadata__"}
merged, wanted = read(sys.argv[1]), read(sys.argv[2])
with open(sys.argv[3], "a") as log:
    log.write(sys.argv[1] + "\\n")
time.sleep(float(sys.argv[4]))
print("some words")
print(sum(float(np.square(merged[name] - each).sum()) for name, each in wanted.items()))
"""


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Any]:
    """A recipe without a method: two fine-tunes, which leave embedding and norm alone, and their base."""
    random = np.random.default_rng(0)
    base = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    changes = [
        {
            name: 0.1 * random.standard_normal(each.shape).astype(np.float32) * ("layers" in name)
            for name, each in base.items()
        }
        for _ in range(2)
    ]
    paths = [
        make_model(tmp_path / f"m{at}", {name: base[name] + change[name] for name in base}, config=CONFIG)
        for at, change in enumerate(changes)
    ]
    wanted = {
        name: base[name]
        + sum(share * change[name] for share, change in zip(WANTED["attn" in name], changes, strict=True))
        for name in base
    }
    make_model(tmp_path / "wanted", {name: each.astype(np.float32) for name, each in wanted.items()}, config=CONFIG)
    return {
        "model_path_list": [str(each) for each in paths],
        "base_model_path": str(make_model(tmp_path / "base", base, config=CONFIG)),
        "output_path": str(tmp_path / "out"),
    }


def distance(folder: Path) -> float:
    """How far a merge is from what is wanted, squared."""
    merged, wanted = read_model(folder), read_model(folder_of_wanted(folder))
    return float(sum(np.square(array(merged[name]) - array(each)).sum() for name, each in wanted.items()))


def folder_of_wanted(folder: Path) -> Path:
    report = json.loads((folder / "merge_config.json").read_text())
    return Path(report["base_model_path"]).parent / "wanted"


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "trials.csv").read_text(encoding="utf-8").splitlines()))


def without_times(folder: Path) -> list[dict[str, str]]:
    return [{name: each for name, each in row.items() if "seconds" not in name} for row in table(folder)]


def written(tmp_path: Path, recipe: Mapping[str, object]) -> Path:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def command(tmp_path: Path, *, sleep: float = 0.0) -> str:
    """One that evaluates as :func:`distance` does, and writes down what."""
    (tmp_path / "eval.py").write_text(EVALUATE, encoding="utf-8")
    return f"{sys.executable} {tmp_path / 'eval.py'} {{model}} {tmp_path / 'wanted'} {tmp_path / 'evaluated'} {sleep}"


def test_weights_of_layer_groups_are_found(tmp_path: Path, models: dict[str, Any]) -> None:
    found = package.tune(models, distance, 20, groups=1, attention_apart=True, progress=False)
    first, best = found.trials[0].numbers["value"], found.best.numbers["value"]
    assert best < 0.8 * first
    assert [*found.best.parameters] == [
        f"layers 0-3 {part} weight {model}" for part in ("attention", "MLP") for model in (1, 2)
    ], "embedding and norm are the base's in every model"
    assert distance(tmp_path / "out") == best
    assert package.verify(tmp_path / "out", full=True, progress=False).holds
    study = tmp_path / "out.tune"
    assert {*snapshot(study)} == {"best.yaml", "history.svg", "study.db", "trials.csv"}
    package.merge(**package_recipe(study / "best.yaml"), output_path=tmp_path / "again", progress=False)
    assert read_model(tmp_path / "again") == read_model(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "merge_config.json").read_text())
    assert settings["rules"][0]["weight_list"] == [*found.best.parameters.values()][:2]
    assert [row["trial"] for row in table(study) if row["best"] == "1"] == [str(found.best.number)]
    assert (study / "history.svg").read_text().count("<circle") == 21


def package_recipe(path: Path) -> dict[str, Any]:
    from modelfuse.recipe.files import load_recipe

    return load_recipe(path)


@pytest.mark.parametrize(
    "recipe",
    [
        {"weight_list": {"tune": [0, 1]}},
        {"merge_method": "ties", "lambda": {"tune": [0.1, 2], "log": True}, "reserve_p": [0.5, {"tune": [0.1, 1]}]},
        {"merge_method": "iso_c", "lambda": {"tune": ["norm 0.2", "norm 1"]}},
        {"rules": [{"tensors": "*.mlp.*", "weight_list": {"tune": [0, 1]}}], "weight_list": [0.5, 0.25]},
        {"merge_method": "dare_linear", "seed": {"tune": [0, 9]}},
    ],
)
def test_what_is_evaluated_is_what_a_merge_gives(
    tmp_path: Path, models: dict[str, Any], recipe: dict[str, Any]
) -> None:
    """Byte for byte, although only what has changed is made again."""
    seen = dict[str, Any]()

    def evaluate(folder: Path) -> float:
        settings = json.loads((folder / "merge_config.json").read_text())
        assert package.verify(folder, full=True, progress=False).holds
        seen[folder.name] = settings, read_model(folder)
        return len(seen) % 3

    package.tune({**models, **recipe}, evaluate, 5, progress=False)
    assert sorted(seen) == [f"trial-{number}" for number in range(5)]
    for name, (settings, tensors) in seen.items():
        package.merge(**{**settings, "output_path": tmp_path / name, "overwrite": False}, progress=False)
        assert read_model(tmp_path / name) == tensors, name


def test_tensors_that_did_not_change_are_not_made_again(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    written, plain = list[int](), merged_folders.MergedFolder.write
    merges = list[int]()

    def write(self: Any, name: str, offset: int, data: memoryview) -> None:
        written.append(len(data))
        plain(self, name, offset, data)

    def evaluate(folder: Path) -> float:
        merges.append(sum(written))
        written.clear()
        return 0.0

    monkeypatch.setattr(merged_folders.MergedFolder, "write", write)
    rules = [{"tensors": "*.2.mlp.*", "weight_list": {"tune": [0, 1]}}]
    package.tune({**models, "rules": rules}, evaluate, 4, progress=False)
    assert merges[0] > sum(4 * math.prod(shape) for shape in SHAPES.values())
    assert merges[1:] == [4 * 6 * 4] * 3


def test_weights_of_adapters_are_searched(tmp_path: Path) -> None:
    base, _ = make_base(tmp_path / "base")
    adapters = [adapter_of(tmp_path / f"L{seed}", seed, Q, DOWN)[0] for seed in (1, 2)]
    recipe = {"model_path_list": adapters, "base_model_path": base, "output_path": tmp_path / "out"}
    for number, more in enumerate([{}, {"output_format": "lora"}, {"output_format": "lora", "merge_method": "ridge"}]):
        output = tmp_path / f"out{number}"
        found = package.tune({**recipe, **more}, lambda _: 1.0, 2, output_path=output, progress=False)
        weights = ["weight 1", "weight 2", *(["lambda"] if "merge_method" in more else [])]
        assert [*found.best.parameters] == weights, more


def test_a_killed_run_goes_on(tmp_path: Path, models: dict[str, Any]) -> None:
    """And comes to the same as one that was never killed."""
    recipe = written(tmp_path, models)
    words = ("tune", recipe, "--evaluate", command(tmp_path, sleep=0.1), "--budget", 9)
    process = start(*words)
    log = tmp_path / "evaluated"
    deadline = time.monotonic() + 60
    while (not log.exists() or len(log.read_text().splitlines()) < 4) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    shared = merged_folders.RAM_DISK
    left = [*shared.glob(f"{merged_folders.prefix_of(tmp_path / 'out.tune')}*")] if shared.is_dir() else []
    assert not (tmp_path / "out").exists()
    before = len(log.read_text().splitlines())
    process = start(*words)
    told = process.communicate(timeout=100)[1]
    assert process.returncode == 0, told
    assert f"Resuming the interrupted run: {before - 1} of 9" in told
    assert len(log.read_text().splitlines()) == 10
    assert not any(each.exists() for each in left), "what a killed run left in memory is removed"
    package.tune(models, command(tmp_path), 9, output_path=str(tmp_path / "whole"), progress=False)
    assert without_times(tmp_path / "out.tune") == without_times(tmp_path / "whole.tune")
    assert read_model(tmp_path / "out") == read_model(tmp_path / "whole")


def test_more_budget_goes_on_and_another_request_does_not(
    tmp_path: Path, modelfuse: Run, models: dict[str, Any]
) -> None:
    recipe = written(tmp_path, models)
    words = ("tune", recipe, "--evaluate", command(tmp_path), "--overwrite")
    assert modelfuse(*words, "--budget", 3).status == 0
    said = modelfuse(*words, "--budget", 4, "--json")
    assert said.status == 0, said.err
    document = json.loads(said.out)
    assert document["document"] == "tune/1"
    assert document["trials"] == 4
    assert len((tmp_path / "evaluated").read_text().splitlines()) == 4
    said = modelfuse(*words, "--budget", 5, "--merge_method", "ties")
    assert said.status == 2
    assert "is the study of another request: the setting merge_method has changed" in said.err


def test_several_numbers_give_a_front(tmp_path: Path, models: dict[str, Any]) -> None:
    def evaluate(folder: Path) -> dict[str, float]:
        share = json.loads((folder / "merge_config.json").read_text())["weight_list"][0]
        return {"chat": share, "loss": share**2 if share < 1 else 5.0}

    recipe = {**models, "weight_list": [{"tune": [0, 1.5]}, 0.5]}
    found = package.tune(recipe, evaluate, 12, direction=["chat=maximize"], progress=False)
    assert {each.number for each in found.front} >= {each.number for each in found.trials if each.numbers["chat"] < 1}
    assert found.best is found.front[0]
    assert found.best.numbers["chat"] == max(each.numbers["chat"] for each in found.front)
    front = {each.name for each in (tmp_path / "out.tune" / "front").iterdir()}
    assert front == {f"trial-{each.number}.yaml" for each in found.front}
    package.merge(
        **package_recipe(tmp_path / "out.tune" / "front" / f"trial-{found.front[-1].number}.yaml"),
        output_path=tmp_path / "other",
        progress=False,
    )
    with pytest.raises(EvaluationError, match="but the first one chat, loss"):
        package.tune(recipe, lambda _: 1.0, 13, direction=["chat=maximize"], progress=False, overwrite=True)


def test_evaluations_run_beside_each_other(tmp_path: Path, modelfuse: Run, models: dict[str, Any]) -> None:
    words = ("tune", written(tmp_path, models), "--evaluate", command(tmp_path), "--budget", 8, "--jobs", 3)
    said = modelfuse(*words, "--scratch", tmp_path / "base" / "..")
    assert said.status == 0, said.err
    folders = (tmp_path / "evaluated").read_text().splitlines()
    assert len(folders) == len(set(folders)) == 8
    assert len({Path(each).parent for each in folders}) == 3
    assert not [each for each in tmp_path.iterdir() if each.name.startswith("modelfuse-tune-")]
    assert len(table(tmp_path / "out.tune")) == 8


def test_a_value_that_is_no_number_is_as_bad_as_can_be(tmp_path: Path, models: dict[str, Any]) -> None:
    values = iter([2.0, math.nan, math.inf, 1.0, math.nan, math.nan, 3.0, 4.0, 5.0])
    found = package.tune(models, lambda _: next(values), 9, direction="minimize", progress=False)
    assert found.best.number == 3
    assert table(tmp_path / "out.tune")[1]["value"] == "nan"


@pytest.mark.parametrize(
    ("evaluate", "told"),
    [
        ("echo out; printf 'bad \\033[2J\\n' >&2; exit 3; {model}", ("ended with status 3", r"bad \x1b[2J")),
        ("kill -9 $$; {model}", ("was ended by signal 9",)),
        ("echo fine; : {model}", ("printed no number: the last line is 'fine'",)),
        (": {model}", ("printed no number: nothing was printed",)),
        ('echo \'{{"a": "b"}}\'; : {model}', ("'a' is 'b'",)),
        ("python eval.py", ("has no {model} for the merged model", "{model}")),
    ],
)
def test_an_evaluation_that_fails_says_so(
    tmp_path: Path, modelfuse: Run, models: dict[str, Any], evaluate: str, told: tuple[str, ...]
) -> None:
    said = modelfuse("tune", written(tmp_path, models), "--evaluate", evaluate.replace("{{", "{").replace("}}", "}"))
    assert said.status == 2
    assert all(each in said.err for each in told), said.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.tune").exists()


def test_a_later_failure_keeps_what_was_found(tmp_path: Path, models: dict[str, Any]) -> None:
    def failing(folder: Path) -> float:
        if folder.name == "trial-2":
            raise KeyboardInterrupt
        return distance(folder)

    with pytest.raises(KeyboardInterrupt) as caught:
        package.tune(models, failing, 5, progress=False)
    assert "the same command resumes it" in caught.value.__notes__[0]
    assert package.tune(models, distance, 5, progress=False).trials[4].number == 4


@pytest.mark.parametrize(
    ("recipe", "words", "told"),
    [
        ({"weight_list": {"tune": [1, 0]}}, (), "the first should be less than the second"),
        ({"weight_list": {"tune": [0, 1, 2]}}, (), "Give the two ends"),
        ({"weight_list": {"tune": [0, "x"]}}, (), "weight_list: 'x' is not a number"),
        ({"lambda": {"tune": [0, 1], "log": True}}, (), "for numbers above 0"),
        ({"lambda": {"tune": [0, 1], "start": 3}}, (), "start is 3, which is not within 0 and 1"),
        ({"lambda": {"tune": [0, 1], "step": 3}}, (), "tune has no option 'step'"),
        ({"n_process": {"tune": [1, 4]}}, (), "n_process cannot be searched"),
        ({"rescale": {"tune": [0, 1]}}, (), "rescale cannot be searched"),
        ({"merge_method": "ties", "reserve_p": {"tune": [0, 1]}}, (), "reserve_p is searched up to 0"),
        ({"merge_method": "slerp", "base_model_path": None}, (), "slerp has no weights to search"),
        ({"merge_method": "model_stock"}, ("--groups", 2), "model_stock takes none"),
        ({}, ("--groups", 7), "the models have 4 layers"),
        ({}, ("--attention-apart",), "groups is not given"),
        ({}, ("--sampler", "random"), "invalid choice"),
        ({}, ("--budget", 0), "budget is 0"),
        ({}, ("--direction", "up"), "direction is 'up'"),
        ({}, ("--direction", "b=maximize"), "direction names 'b', but the evaluation gives value"),
        ({}, ("--data", "x"), "data is for --evaluate perplexity"),
        ({"output_path": None}, (), "output_path is not given"),
        ({"output_path": "s3://bucket/out"}, (), "Name a folder here"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, modelfuse: Run, models: dict[str, Any], recipe: dict[str, Any], words: tuple[object, ...], told: str
) -> None:
    path = written(tmp_path, {**models, **recipe})
    said = modelfuse("tune", path, "--evaluate", "echo 1; : {model}", *words)
    assert said.status == 2
    assert told in said.err


def test_merge_says_who_takes_marks(tmp_path: Path, modelfuse: Run, models: dict[str, Any]) -> None:
    said = modelfuse("merge", written(tmp_path, {**models, "weight_list": {"tune": [0, 1]}}))
    assert said.status == 2
    assert "only `modelfuse tune` searches numbers" in said.err


def test_marks_may_stand_in_a_configuration_of_mergekit(tmp_path: Path, models: dict[str, Any]) -> None:
    one, two = models["model_path_list"]
    (tmp_path / "config.yml").write_text(
        f"models:\n- model: {one}\n  parameters: {{weight: {{tune: [0, 1]}}}}\n"
        f"- model: {two}\n  parameters: {{weight: [{{tune: [0.25, 0.75]}}, 0.5]}}\n"
        f"merge_method: task_arithmetic\nbase_model: {models['base_model_path']}\ndtype: float32\n",
        encoding="utf-8",
    )
    found = package.tune(
        tmp_path / "config.yml",
        lambda folder: float(len(read_model(folder))),
        3,
        output_path=tmp_path / "out",
        progress=False,
    )
    assert [*found.best.parameters] == ["models 1 parameters weight", "models 2 parameters weight 1"]
    assert found.trials[0].parameters["models 2 parameters weight 1"] == 0.5
    package.merge(**package_recipe(tmp_path / "out.tune" / "best.yaml"), output_path=tmp_path / "again", progress=False)
    assert read_model(tmp_path / "again") == read_model(tmp_path / "out")


def test_merges_stand_beside_the_study_where_memory_is_short(
    models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_folders, "_most_ram", lambda: 1)
    folders = list[Path]()

    def evaluate(folder: Path) -> float:
        folders.append(folder)
        return 1.0

    package.tune(models, evaluate, 2, progress=False)
    assert all(each.is_relative_to(tmp_path / "out.tune") for each in folders)
    assert not [each for each in (tmp_path / "out.tune").iterdir() if each.is_dir()]


def test_a_study_that_is_none_is_told(models: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out.tune").mkdir()
    (tmp_path / "out.tune" / "study.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(OutputError, match="cannot be used as a study"):
        package.tune(models, distance, 2, progress=False)


def test_perplexity_of_texts_is_built_in(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    shipped = ROOT / "demo" / "models"
    (tmp_path / "texts.jsonl").write_text('{"text": "function add(a, b) { return a + b; }"}\n"var x = 1;"\n')
    (tmp_path / "sums.txt").write_text("12 + 30 = 42\n" * 3)
    found = package.tune(
        {"model_path_list": [str(shipped / "code")], "base_model_path": str(shipped / "base"),
         "lambda": {"tune": [0, 1], "start": 0}},
        "perplexity", 2, data=[tmp_path / "texts.jsonl", tmp_path / "sums.txt"], output_path=tmp_path / "out",
        progress=False,
    )  # fmt: skip
    assert all(1 < number < 1000 for number in found.trials[0].numbers.values())
    assert [*found.directions] == ["texts", "sums"]
    code = found.trials[1]
    assert code.numbers["texts"] < found.trials[0].numbers["texts"], "the expert of code predicts code better"


def test_gradients_are_those_of_the_loss(tmp_path: Path) -> None:
    """And steps along them lead down, whichever process makes them."""
    pytest.importorskip("transformers")
    shipped = ROOT / "demo" / "models"
    (tmp_path / "texts.txt").write_text("function add(a, b) {\n  return a + b;\n}\n12 + 30 = 42\n")
    recipe: dict[str, Any] = {
        "model_path_list": [str(shipped / "code"), str(shipped / "arithmetic")],
        "base_model_path": str(shipped / "base"), "output_dtype": "float32", "output_path": str(tmp_path / "out"),
        "weight_list": [{"tune": [0, 1]}, 0.25], "lambda": {"tune": [0.5, 1.5]},
        "rules": [{"tensors": "*.mlp.*", "weight_list": [0.25, {"tune": [0, 1], "start": 0.75}]}],
    }  # fmt: skip
    words: dict[str, Any] = {"data": [tmp_path / "texts.txt"], "sampler": "gradient", "progress": False}
    first = package.tune(recipe, "perplexity", 2, **words).trials
    found = package.tune(recipe, "perplexity", 3, **words, overwrite=True).trials
    assert found[:2] == first
    losses = [math.log(each.numbers["perplexity"]) for each in found]
    assert losses == sorted(losses, reverse=True)
    evaluate = Perplexity([tmp_path / "texts.txt"])
    space = read_space(recipe)
    assert found[0].gradient.keys() == space.start.keys() == {"weight_list 1", "lambda", "rule 1 weight_list 2"}
    for name, slope in found[0].gradient.items():
        sides = []
        for step in (-0.05, 0.05):
            point = {**space.start, name: space.start[name] + step}
            settings: dict[str, Any] = {**space.settings(point), "output_path": tmp_path / "side", "overwrite": True}
            package.merge(**settings, progress=False)
            sides.append(math.log(evaluate(tmp_path / "side")["perplexity"]))
        assert slope == pytest.approx((sides[1] - sides[0]) / 0.1, rel=0.05), name


@pytest.mark.parametrize(
    ("recipe", "words", "told"),
    [
        ({}, ("--evaluate", "echo 1; : {model}"), "needs gradients of the loss"),
        ({"merge_method": "ties"}, (), "is for linear merges"),
        ({"seed": {"tune": [0, 5]}}, (), "seed is neither"),
        ({}, ("--jobs", 2), "one trial at a time"),
    ],
)
def test_gradients_that_nobody_knows_are_refused(
    tmp_path: Path, modelfuse: Run, models: dict[str, Any], recipe: dict[str, Any], words: tuple[object, ...], told: str
) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "texts.txt").write_text("text")
    evaluation = () if "--evaluate" in words else ("--evaluate", "perplexity", "--data", tmp_path / "texts.txt")
    said = modelfuse("tune", written(tmp_path, {**models, **recipe}), "--sampler", "gradient", *evaluation, *words)
    assert said.status == 2
    assert told in said.err


@pytest.mark.parametrize(
    ("content", "told"), [("{", "line 1 is no JSON"), ('{"a": 1}', "line 1 has no text"), (" ", "holds no text")]
)
def test_texts_that_are_none_are_told(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "texts.jsonl").write_text(content)
    with pytest.raises(RecipeError, match=told):
        parse_tune(["--evaluate", "perplexity", "--data", str(tmp_path / "texts.jsonl")], {})


def test_numbers_are_found_in_what_is_printed() -> None:
    assert numbers_in('{\n "a": 1\n}') == {"a": 1.0}
    assert math.isnan(numbers_in("x\nnan")["value"])
    with pytest.raises(ValueError, match="True"):
        numbers_in("true")


def test_groups_follow_every_stack() -> None:
    names = [
        f"model.{stack}.layers.{layer}.{part}.weight"
        for stack, layers in (("vision_tower", 2), ("language_model", 4))
        for layer in range(layers)
        for part in ("self_attn.q", "post_attention_layernorm", "mlp.up")
    ]
    config = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 2}}
    found = {group.name: group.globs for group in find_groups(names, config, 2, True)}
    assert found["model.language_model.layers 2-3 attention"] == (
        "model.language_model.layers.2.self_attn.*", "model.language_model.layers.3.self_attn.*",
    )  # fmt: skip
    assert len(found) == 8
    with pytest.raises(RecipeError, match="no layers were found"):
        find_groups(["a", "b"], {}, 2, False)


def test_marks_say_what_is_searched() -> None:
    marks = {"density": {"tune": [0.1, 0.9]}, "t": {"tune": [0, 1]}}
    rules = [{"tensors": "*", "lambda": {"tune": [1, 100], "log": True}}]
    space = read_space({"model_path_list": ["a", "b"], "merge_method": "dare_ties", **marks, "rules": rules})
    assert {each.name: each.start for each in space.dimensions} == {
        "reserve_p": 0.7, "slerp_alpha": 0.5, "rule 1 lambda": 1.0,
    }  # fmt: skip
    assert space.dimensions[2].from_unit(0.5) == pytest.approx(10)


def test_without_the_extra_it_is_named(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelfuse.planning.optional_packages.find_spec", lambda name: None)
    with pytest.raises(ModelfuseError, match=r"tune needs optuna, which is not installed\n.*\[tune\]"):
        package.tune(models, distance, 2, progress=False)
