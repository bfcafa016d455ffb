"""Configurations of arcee's mergekit, read: their grammar, whose values each tensor gets, and what is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import hostile
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelfuse.errors import RecipeError
from modelfuse.recipe.arcee.configuration import Configuration
from modelfuse.recipe.arcee.documents import read_configurations, stages_of
from modelfuse.recipe.arcee.methods import METHODS
from modelfuse.recipe.arcee.parameters import depth_of
from modelfuse.recipe.arcee.references import Reference, Stage
from modelfuse.recipe.files import is_configuration, load_documents
from modelfuse.recipe.hub_names import HubName

TIES = """
merge_method: ties
base_model: org/base
models:
  - model: org/a
    parameters: {weight: 0.5}
  - model: org/b
    parameters: {weight: [0, 1]}
parameters: {density: 0.5}
"""


def read(text: str, **changes: Any) -> Configuration:
    content = yaml.safe_load(text) | changes
    return read_configurations(yaml.safe_dump(content)).result


def refused(text: str, **changes: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        read(text, **changes)
    return str(caught.value)


def whole(config: Configuration, name: str, depth: float = 0.0, part: int = 0) -> dict[str, Any]:
    module = next(iter(config.modules.values()))
    return config.whole_values(module, module.slices[part], name, depth)


def of_model(config: Configuration, model: int, name: str, depth: float = 0.0, part: int = 0) -> dict[str, Any]:
    module = next(iter(config.modules.values()))
    chosen = module.slices[part]
    return config.model_values(module, chosen, chosen.sources[model], name, depth)


def test_models_become_one_slice_with_the_base_at_its_end() -> None:
    config = read(TIES)
    (part,) = config.modules["default"].slices
    assert [str(source.model) for source in part.sources] == ["org/a", "org/b", "org/base"]
    assert {source.layers for source in part.sources} == {None}
    assert [str(each) for each in config.references] == ["org/base", "org/a", "org/b"]
    listed = read(TIES, base_model="org/a")
    assert [str(source.model) for source in listed.modules["default"].slices[0].sources] == ["org/a", "org/b"]


def test_a_file_is_known_by_its_keys() -> None:
    assert all(is_configuration({key: 1}) for key in ("models", "slices", "modules"))
    assert not is_configuration({"model_path_list": ["a"], "merge_method": "linear"})


def test_gradients_run_over_the_layers_of_a_slice() -> None:
    config = read(TIES)
    depths = [depth_of(layer, 5) for layer in range(5)]
    assert [of_model(config, 1, "x", depth)["weight"] for depth in depths] == [0, 0.25, 0.5, 0.75, 1]
    # The only layer of a slice has the last value, what is beside the layers the first.
    assert of_model(config, 1, "x", depth_of(0, 1))["weight"] == 1
    assert of_model(config, 1, "lm_head.weight")["weight"] == 0


def test_a_gradient_of_switches_takes_the_one_before() -> None:
    config = read(TIES, parameters={"normalize": [True, False, True]})
    assert [whole(config, "x", depth)["normalize"] for depth in (0, 0.4, 0.5, 0.9, 1)] == [
        True,
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("value", [0.25, "0.25", "2.5e-1", {"value": 0.25}, [{"value": "0.25"}], [0.25]])
def test_one_value_is_written_in_many_ways(value: object) -> None:
    assert whole(read(TIES, parameters={"lambda": value}), "x")["lambda"] == 0.25


def test_the_first_filter_that_matches_counts() -> None:
    entries = [
        {"filter": "mlp", "value": 1},
        {"filter": "up_proj", "value": 2},
        {"filter": "*", "value": 3},
        {"value": 4},
    ]
    config = read(TIES, parameters={"lambda": entries})
    names = {"layers.0.mlp.up_proj.weight": 1, "other.up_proj.weight": 2, "norm.weight": 3}
    assert {name: whole(config, name)["lambda"] for name in names} == names


def test_what_no_filter_is_meant_for_goes_on_in_the_outer_scope() -> None:
    slices = [{"sources": [{"model": name, "layer_range": [0, 2]} for name in ("org/base", "org/a")],
               "parameters": {"weight": [{"filter": "mlp", "value": 3}], "density": []}}]  # fmt: skip
    text = {"merge_method": "ties", "base_model": "org/base", "slices": slices}
    config = read("{}", **text, parameters={"weight": 7, "density": [{"filter": "attn", "value": 0.25}]})
    assert of_model(config, 1, "mlp.weight") == {"weight": 3, "density": 1.0}
    assert of_model(config, 1, "attn.weight") == {"weight": 7, "density": 0.25}


def test_scopes_are_looked_at_from_the_inside() -> None:
    source = {"model": "org/a", "layer_range": [0, 2], "parameters": {"weight": 1, "lambda": 9}}
    base = {"model": "org/base", "layer_range": [0, 2]}
    content: dict[str, Any] = {
        "merge_method": "ties", "base_model": "org/base", "parameters": {"weight": 4, "lambda": 4, "density": 0.4},
        "modules": {"default": {"parameters": {"weight": 3, "lambda": 3, "density": 0.3},
                    "slices": [{"sources": [source, base], "parameters": {"weight": 2, "lambda": 2}}]}},
    }  # fmt: skip
    config = read("{}", **content)
    assert of_model(config, 0, "x") == {"weight": 1, "density": 0.3}
    assert whole(config, "x")["lambda"] == 2  # What stands under a model is not read for the whole merge.
    assert any(
        "lambda of modules.default.slices[0].sources[0].parameters has no effect" in line for line in config.notes
    )


def test_a_parameter_that_must_be_given_is_asked_for_by_its_model_and_tensor() -> None:
    config = read(TIES, models=[{"model": "org/a"}, {"model": "org/b", "parameters": {"weight": 1}}])
    with pytest.raises(RecipeError, match=r"weight is not given for the tensor norm\.weight of org/a"):
        of_model(config, 0, "norm.weight")
    assert of_model(config, 2, "norm.weight")["weight"] is None  # The base needs none,
    linear = read("merge_method: linear\nbase_model: org/base\nmodels: [{model: org/a, parameters: {weight: 1}}]")
    with pytest.raises(RecipeError, match="weight is not given for the tensor x of org/base"):
        of_model(linear, 1, "x")  # but where it is a model like any other.
    with pytest.raises(RecipeError, match="t is not given for slerp for the tensor x"):
        whole(read("merge_method: slerp\nbase_model: org/a\nmodels: [{model: org/a}, {model: org/b}]"), "x")


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_those_of_the_method(method: str) -> None:
    grammar = METHODS[method]
    count = grammar.models[0] + (grammar.base == "required" and not grammar.counts_base)
    models = [{"model": f"org/m{number}", "parameters": {"weight": 1}} for number in range(max(count, 1))]
    base = {} if grammar.base == "ignored" else {"base_model": models[-1]["model"]}
    extra = [{"model": "org/x"}] if grammar.base == "optional" else []
    config = read("{}", merge_method=method, models=[*models, *extra], **base, parameters={"t": 0.5})
    values = whole(config, "x") | of_model(config, 0, "x")
    expected = {
        "ties": (True, False), "della": (True, True), "dare_ties": (False, True), "della_linear": (False, True),
        "dare_linear": (False, True), "breadcrumbs": (False, False), "task_arithmetic": (False, False),
    }  # fmt: skip
    if method in expected:
        assert (values["normalize"], values["rescale"]) == expected[method]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"normalze": True}, "The key 'normalze' has no effect; put normalize under parameters:"),
        ({"modells": []}, "The key 'modells' has no effect; is 'models' meant?"),
        ({"random_seed": 3}, "The key 'random_seed' has no effect"),
        (
            {"models": [{"model": "org/a", "weight": 1}]},
            "The key 'weight' of models[0] has no effect; put weight under",
        ),
        ({"models": [{"model": "org/a", "parameters": {"densty": 1}}]}, "is 'density' meant?"),
        ({"parameters": {"t": 1}}, "The key 't' of parameters has no effect"),
        ({"parameters": {"lambda": [{"fliter": "x", "value": 1}]}}, "is 'filter' meant?"),
        ({"tokenizer": {"sauce": "union"}}, "The key 'sauce' of tokenizer has no effect; is 'source' meant?"),
    ],
)
def test_what_has_no_effect_is_told(changes: dict[str, Any], line: str) -> None:
    assert any(line in note for note in read(TIES, **changes).notes)


def test_usual_configurations_have_no_notes() -> None:
    assert read(TIES, parameters={"int8_mask": True, "normalize": True, "density": 0.5}, name="mine").notes == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_method": "tise"}, "merge_method is 'tise', which is no method\nDid you mean 'ties'?"),
        ({"merge_method": None}, "merge_method is None"),
        ({"slices": [{"sources": []}]}, "models and slices are given"),
        ({"models": []}, "None of models, slices and modules is given"),
        ({"models": "org/a"}, "models is 'org/a'"),
        ({"models": ["org/a"]}, "Write it as model: org/a"),
        ({"models": [{"parameters": {}}]}, r"models\[0\] names no model"),
        ({"models": [{"model": "org/a+b/c+d/e"}]}, "there is one [+] at most"),
        ({"models": [{"model": "org/a@x@y"}]}, "there is one @ at most"),
        ({"models": [{"model": {"path": "org/a"}}]}, r"models\[0\].model.model names no model"),
        ({"models": [{"model": "org/a"}, {"model": "org/a"}]}, "models has the model org/a twice"),
        ({"base_model": None}, "merge_method ties needs base_model"),
        ({"dtype": "bf16"}, "dtype is 'bf16'\nWrite bfloat16."),
        ({"out_dtype": "int8"}, "out_dtype is 'int8', in which no weights are merged"),
        ({"parameters": {"density": "much"}}, "parameters.density is 'much', but a number is needed"),
        ({"parameters": {"density": [0.1, None]}}, "parameters.density is None, but a number is needed"),
        ({"parameters": {"density": float("nan")}}, "parameters.density is nan"),
        ({"parameters": {"density": 10**400}}, "parameters.density is 1000"),
        ({"parameters": {"density": {"filter": "mlp"}}}, "parameters.density has no value"),
        ({"parameters": {"normalize": 2}}, "parameters.normalize is 2, but true or false is needed"),
        ({"parameters": [1]}, r"parameters is \[1\]"),
        ({"tokenizer_source": "union", "tokenizer": {}}, "tokenizer_source and tokenizer are both given"),
        ({"tokenizer_source": "model:org/a"}, "Write org/a, without model: before it"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "pad_to_multiple_of is 0"),
        ({"tokenizer": {"tokens": {"<x>": {"source": {"kind": "one"}}}}}, "kind is 'one'"),
        ({"tokenizer": {"tokens": {"<x>": {"source": {"kind": "model_token", "model": "org/a"}}}}}, "a token or a"),
        ({"tokenizer": {"tokens": {"<x>": {"force": True}}}}, "is forced, but has no source"),
        ({"chat_template": 3}, "chat_template is 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], message: str) -> None:
    import re

    assert re.search(message, refused(TIES, **changes))


def slices(*ranges: list[Any], **more: Any) -> dict[str, Any]:
    """Slices of one model."""
    listed = [{"sources": [{"model": "org/a", "layer_range": each}]} for each in ranges]
    return {"merge_method": "passthrough", "slices": listed, **more}


@pytest.mark.parametrize("ends", [[2, 2], [3, 1], None, [0], [0, 1.5], ["0", "4"], [-1, 2], [0, True], 4])
def test_ranges_without_layers_are_refused(ends: object) -> None:
    assert "slices[1].sources[0].layer_range is" in refused("{}", **slices([0, 2], ends))  # type: ignore[arg-type]


def test_ranges_overlap_and_start_anywhere() -> None:
    config = read("{}", **slices([0, 4], [2, 6]))
    assert [part.sources[0].layers for part in config.modules["default"].slices] == [(0, 4), (2, 6)]
    assert not config.modules["default"].slices[0].parameters


def test_ranges_of_one_slice_are_as_long_as_each_other() -> None:
    sources = [{"model": "org/a", "layer_range": [0, 4]}, {"model": "org/b", "layer_range": [0, 3]}]
    content = {"merge_method": "linear", "slices": [{"sources": sources}]}
    assert "slices[0] has ranges of different lengths: [0, 4] of org/a, [0, 3] of org/b" in refused("{}", **content)


def test_every_slice_has_the_base_and_its_own_may_be_another() -> None:
    sources = [{"model": f"org/{name}", "layer_range": [0, 4]} for name in "ab"]
    content: dict[str, Any] = {"merge_method": "slerp", "parameters": {"t": 0.5}, "slices": [{"sources": sources}]}
    assert "slices[0] does not have the base model org/c" in refused("{}", **content, base_model="org/c")
    content["slices"][0]["base_model"] = "org/b"
    config = read("{}", **content)
    assert str(config.base_of(config.modules["default"].slices[0])) == "org/b"


@pytest.mark.parametrize(
    ("method", "models", "message"),
    [
        ("slerp", "abc", "takes exactly 2 models, but models has 3"),
        ("nuslerp", "a", "takes exactly 2 models beside the base, but models has 0"),
        ("nearswap", "abc", "takes exactly 1 model beside the base, but models has 2"),
        ("model_stock", "ab", "takes at least 2 models beside the base, but models has 1"),
        (
            "passthrough",
            "ab",
            "takes exactly 1 model, but models has 2\nbase_model is one of its models: leave it out.",
        ),
    ],
)
def test_methods_take_so_many_models(method: str, models: str, message: str) -> None:
    listed = [{"model": f"org/{name}"} for name in models]
    assert message in refused("{}", merge_method=method, base_model="org/a", models=listed)


def test_folders_win_over_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("org/model", "org/odd@name+x"):
        (tmp_path / name).mkdir(parents=True)
    config = read("merge_method: linear\nmodels: [{model: org/model}, {model: org/odd@name+x}, {model: org/other@v1}]")
    assert [each.model for each in config.references] == [
        tmp_path / "org/model", tmp_path / "org/odd@name+x", HubName("org/other", "v1"),
    ]  # fmt: skip
    assert read("merge_method: linear\nmodels: [{model: ./org/model}]").references == (config.references[0],)
    noted = read("merge_method: linear\nmodels: [{model: org/model@main}]")
    assert noted.references == (config.references[0],)
    assert "The revision 'main' of models[0].model has no effect" in noted.notes[0]


def test_models_are_written_in_two_ways() -> None:
    written = {"model": {"path": "org/a", "revision": "v1"}, "lora": {"path": "org/l"}, "override_architecture": "X"}
    short, long = (read("merge_method: linear", models=[{"model": each}]) for each in ("org/a@v1+org/l", written))
    assert read("merge_method: linear", models=[{"model": "hf://org/a@v1+hf://org/l"}]).references == short.references
    assert short.references == long.references == (Reference(HubName("org/a", "v1"), HubName("org/l")),)
    assert str(long.references[0]) == "org/a@v1+org/l"
    assert "override_architecture of models[0].model has no effect" in long.notes[0]


def test_what_words_meant_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a file gives the same merge where other folders are around."""
    text = "merge_method: linear\nmodels: [{model: org/a+org/l}, {model: org/a}, {model: ./org/b}]"
    (tmp_path / "org/b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    first = read_configurations(text)
    assert dict(first.models) == {"org/a": HubName("org/a"), "org/l": HubName("org/l"), "./org/b": tmp_path / "org/b"}
    monkeypatch.chdir("/")
    models = [HubName("org/a", "1" * 40), *list(first.models.values())[1:]]
    again = read_configurations(text, models)
    assert list(again.models.values()) == models
    assert [each.model for each in again.result.references] == [models[0], models[0], models[2]]
    with pytest.raises(RecipeError, match="names 3 models, but model_path_list has 1"):
        read_configurations(text, models[:1])


def test_dtypes_may_have_torchs_prefix() -> None:
    config = read(TIES, dtype="torch.float16", out_dtype="bfloat16")
    assert (config.dtype, config.out_dtype) == ("float16", "bfloat16")


def test_tokens_have_sources() -> None:
    tokens = {
        "<a>": {"source": "org/a", "force": True},
        "<b>": {"source": {"kind": "zero"}},
        "<c>": {"source": {"kind": "model_token", "model": "org/b", "token_id": 3}},
        "<d>": {"source": {"kind": "model_token", "model": {"model": {"path": "org/b"}}, "token": "x"}},
        "<e>": None,
    }
    settings = read(TIES, tokenizer={"source": "base", "tokens": tokens, "pad_to_multiple_of": "64"}).tokenizer
    assert settings is not None
    assert (settings.source, settings.pad_to_multiple_of) == ("base", 64)
    kinds = {name: None if each is None else (each.kind, str(each.model), each.token, each.token_id, each.force)
             for name, each in settings.tokens.items()}  # fmt: skip
    assert kinds == {
        "<a>": ("model", "org/a", None, None, True),
        "<b>": ("zero", "None", None, None, False),
        "<c>": ("model_token", "org/b", None, 3, False),
        "<d>": ("model_token", "org/b", "x", None, False),
        "<e>": None,
    }
    assert read(TIES, tokenizer_source="org/a").tokenizer is not None


STAGES = """
name: last
merge_method: linear
models: [{model: first, parameters: {weight: 1}}, {model: second, parameters: {weight: 1}}]
---
name: second
merge_method: linear
models: [{model: first, parameters: {weight: 1}}]
---
name: first
merge_method: passthrough
models: [{model: org/a}]
"""


def test_documents_come_after_those_that_they_use() -> None:
    documents = read_configurations(STAGES).documents
    assert [each.name for each in documents] == ["first", "second", "last"]
    assert [stages_of(each) for each in documents] == [(), ("first",), ("first", "second")]
    assert documents[2].references[0].model == Stage("first")
    unnamed = read_configurations(STAGES.replace("name: last\n", "")).documents
    assert [each.name for each in unnamed] == ["first", "second", None]


#: Each line nine of the one before.
BOMB = "b0: &b0 x\n" + "\n".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]" for n in range(1, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (STAGES.replace("org/a", "last"), "use each other's results: "),
        (STAGES.replace("name: second", "name: first"), "Two documents have the name 'first'"),
        (STAGES.replace("name: second\n", "").replace("name: last\n", ""), "2 documents of the configuration have no"),
        (STAGES.replace("name: first", "name: ../first"), "cannot be the name of a result"),
        ("", "The configuration is empty"),
        ("--- [", "The configuration is malformed"),
        ("models: !!python/object:os.system []", "The configuration is malformed: the tag .* is not taken"),
        ("merge_method: linear\nmodels: [{model: a, model: b}]", "model is given twice"),
        ("a: &a {b: 1}\nc: {<<: [*a, 3]}", "<< stands for something else than a map"),
        ("a: &a {<<: *a}", "nested too deeply"),
        ("a: {<<: {}, <<: {}}", "<< is given twice"),
        (BOMB, "its aliases stand for more than 100,000 values"),
        ("a: &a [*a]", "nested too deeply"),
    ],
)  # fmt: skip
def test_malformed_files_are_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_configurations(text)


def test_maps_take_the_keys_of_others() -> None:
    text = "a: &a {b: 1, c: 2}\nd: &d {c: 3, e: 4}\nf: {<<: [*a, *d], b: 0}\ng: {<<: *d, x: 1}\nh: {<<: {<<: *a, y: 5}}"
    (found,) = load_documents(text)
    assert found == {"a": {"b": 1, "c": 2}, "d": {"c": 3, "e": 4}, "f": {"b": 0, "c": 2, "e": 4},
                     "g": {"x": 1, "c": 3, "e": 4}, "h": {"y": 5, "b": 1, "c": 2}}  # fmt: skip
    many = "\n".join(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}" for n in range(1, 60))
    assert load_documents(f"m0: &m0 {{x: 1}}\n{many}")[0] == {f"m{n}": {"x": 1} for n in range(60)}


def test_aliases_stand_for_what_they_name() -> None:
    config = read_configurations(
        "merge_method: linear\nmodels: [{model: org/a, parameters: &p {weight: 0.5}}, {model: org/b, parameters: *p}]"
    ).result
    assert of_model(config, 1, "x") == {"weight": 0.5}


FULL = yaml.safe_load(TIES) | {
    "tokenizer": {"source": "union", "tokens": {"<x>": {"source": {"kind": "zero"}, "force": True}}},
    "modules": {"default": {"slices": [{"sources": [{"model": {"model": {"path": "org/a"}}, "layer_range": [0, 2]}]}]}},
}


@given(content=st.one_of(hostile.json_files(FULL), hostile.texts(STAGES.encode())))
@settings(max_examples=150 * hostile.EFFORT, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_configurations_are_refused_in_words(content: bytes) -> None:
    with contextlib.suppress(RecipeError, UnicodeDecodeError):
        read_configurations(content.decode("utf-8-sig"))
