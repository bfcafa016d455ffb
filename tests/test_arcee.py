"""Configurations of arcee's mergekit, merged: layers, filters, types, tokenizers, and what lies beside the weights."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from adapting import factors, lora, make_peft
from conftest import Said, array, bf16, make_model, read_model, snapshot, start
from test_resume import KILLED_AFTER, SPAN
from test_vocabulary import tokenizer_json

import modelfuse as package

Run = Callable[..., Said]
Tensors = dict[str, Any]
WIDTH, WORDS = 4, 6
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
CONFIG: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": WORDS,
                          "hidden_size": WIDTH, "tie_word_embeddings": False, "torch_dtype": "float32"}  # fmt: skip


def in_layer(layer: int) -> list[str]:
    return [f"model.layers.{layer}.{part}" for part in ("mlp.up_proj.weight", "self_attn.q_proj.weight", "norm.weight")]


def tensors(seed: int, layers: int = 4, words: int = WORDS, head: bool = True) -> Tensors:
    draw = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (words, WIDTH), NORM: (WIDTH,)} | (
        {HEAD: (words, WIDTH)} if head else {}
    )
    for layer in range(layers):
        up, query, norm = in_layer(layer)
        shapes |= {up: (6, WIDTH), query: (WIDTH, WIDTH), norm: (WIDTH,)}
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def model(folder: Path, seed: int, layers: int = 4, **more: Any) -> Tensors:
    """Make a model; its tensors."""
    files, config, words = more.pop("files", None), more.pop("config", {}), more.get("words", WORDS)
    made = tensors(seed, layers, **more)
    make_model(folder, made, config=CONFIG | {"num_hidden_layers": layers, "vocab_size": words} | config, files=files)
    return made


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensors]:
    """Models ``base``, ``a`` and ``b`` in the working directory."""
    monkeypatch.chdir(tmp_path)
    return {name: model(tmp_path / name, seed) for seed, name in enumerate(("base", "a", "b"))}


@pytest.fixture
def fuse(merge: Run, tmp_path: Path) -> Callable[..., dict[str, np.ndarray]]:
    """Merges a configuration into ``out``; its tensors."""

    def run(content: Mapping[str, Any] | str, *words: object) -> dict[str, np.ndarray]:
        text = content if isinstance(content, str) else yaml.safe_dump(dict(content), sort_keys=False)
        (tmp_path / "config.yml").write_text(text)
        merge("config.yml", "--output_path", "out", "--overwrite", *words)
        return {name: array(each) for name, each in read_model(tmp_path / "out").items()}

    return run


def listed(*names: str, **parameters: Any) -> list[dict[str, Any]]:
    return [{"model": name, **({"parameters": parameters} if parameters else {})} for name in names]


def linear(*names: str, **more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": listed(*names, weight=1), **more}


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def close(found: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=2e-6, atol=2e-6, err_msg=name)


def test_models_are_added_up_by_gradients_and_filters(three: dict[str, Tensors], fuse: Any) -> None:
    weights = [{"filter": "mlp", "value": [0, 0.3]}, {"filter": "norm", "value": "0.5"}, {"value": [1, 0]}]
    found = fuse({"merge_method": "task_arithmetic", "base_model": "base", "parameters": {"lambda": 2},
                  "models": [*listed("a", weight=weights), *listed("b", weight=1)]})  # fmt: skip
    expected = {}
    for name, base in three["base"].items():
        layer: float = int(name.split(".")[2]) / 3 if "layers" in name else 0
        weight = 0.3 * layer if "mlp" in name else 0.5 if "norm" in name else 1 - layer
        expected[name] = base + 2 * (weight * (three["a"][name] - base) + three["b"][name] - base)
    close(found, expected)


def test_linear_divides_by_the_weights_unless_told_otherwise(three: dict[str, Tensors], fuse: Any) -> None:
    content: dict[str, Any] = {"merge_method": "linear", "models": [*listed("a", weight=1), *listed("b", weight=3)]}
    close(fuse(content), {name: (three["a"][name] + 3 * three["b"][name]) / 4 for name in three["a"]})
    content["parameters"] = {"normalize": False}
    close(fuse(content), {name: three["a"][name] + 3 * three["b"][name] for name in three["a"]})


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_slerp_goes_from_the_base(three: dict[str, Tensors], fuse: Any, names: str) -> None:
    found = fuse({"merge_method": "slerp", "base_model": "a", "models": listed(*names), "parameters": {"t": 0.25}})
    for name, a in three["a"].items():
        b = three["b"][name]
        angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
        expected = (np.sin(0.75 * angle) * a + np.sin(0.25 * angle) * b) / np.sin(angle)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)


def stacked(*ranges: tuple[str, int, int], **more: Any) -> dict[str, Any]:
    slices = [{"sources": [{"model": name, "layer_range": [first, end]}]} for name, first, end in ranges]
    return {"merge_method": "passthrough", "slices": slices, **more}


def test_a_configuration_on_one_line(three: dict[str, Tensors], fuse: Any) -> None:
    close(fuse(json.dumps(linear("a", "b"))), {name: (three["a"][name] + three["b"][name]) / 2 for name in three["a"]})


def test_layers_are_stacked(three: dict[str, Tensors], fuse: Any, tmp_path: Path) -> None:
    found = fuse(stacked(("a", 0, 3), ("b", 1, 4)))
    expected = {EMBEDDING: three["a"][EMBEDDING], NORM: three["b"][NORM], HEAD: three["b"][HEAD]}
    for layer, (name, own) in enumerate([("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)]):
        expected |= {to: three[name][of] for to, of in zip(in_layer(layer), in_layer(own), strict=True)}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], values) for name, values in expected.items())
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 6
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    left = {each["path"][-1]: each["left_out"][0] for each in report["inputs"]}
    assert sorted(left["a"]["tensors"]) == sorted([*in_layer(3), NORM, HEAD])
    assert left["a"]["because"] == "no slice contains it"


def test_a_scale_may_quiet_a_repeated_layer(three: dict[str, Tensors], fuse: Any) -> None:
    content = stacked(("a", 0, 2), ("a", 1, 2))
    content["slices"][1]["sources"][0]["parameters"] = {"scale": [{"filter": "q_proj", "value": 0.5}, {"value": 1.0}]}
    found = fuse(content)
    up, query, _ = in_layer(2)
    np.testing.assert_array_equal(found[query], three["a"][in_layer(1)[1]] / 2)
    np.testing.assert_array_equal(found[up], three["a"][in_layer(1)[0]])


def test_layers_of_several_models_are_merged_where_they_stand(three: dict[str, Tensors], fuse: Any) -> None:
    """Filters of a model's own parameters look at its own names, those of the merge at the output's."""
    weight = [{"filter": "layers.2.", "value": 1}, {"value": 0}]
    sources = [{"model": "a", "layer_range": [2, 4], "parameters": {"weight": weight}},
               {"model": "base", "layer_range": [0, 2]}]  # fmt: skip
    found = fuse({"merge_method": "task_arithmetic", "base_model": "base", "slices": [{"sources": sources}]})
    for to, of in zip(in_layer(0), in_layer(2), strict=True):
        np.testing.assert_allclose(found[to], three["a"][of], rtol=1e-5, atol=1e-6)
    assert all(np.array_equal(found[name], three["base"][name]) for name in (*in_layer(1), EMBEDDING, HEAD))
    assert len(found) == 9


def test_per_layer_settings_go_with_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fuse: Any) -> None:
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "a", 1, config={"layer_types": ["f", "l", "l", "f"]})
    fuse(stacked(("a", 0, 2), ("a", 1, 4)))
    assert config_of(tmp_path / "out")["layer_types"] == ["f", "l", "l", "l", "f"]


def test_types_are_rounded_once(three: dict[str, Tensors], tmp_path: Path, fuse: Any) -> None:
    make_model(tmp_path / "half", {name: bf16(values) for name, values in three["b"].items()},
               config=CONFIG | {"num_hidden_layers": 4, "torch_dtype": "bfloat16"})  # fmt: skip
    linear = {"merge_method": "linear", "models": listed("a", "half", weight=1)}

    def types(content: Mapping[str, Any], *words: str) -> tuple[set[str], str]:
        fuse(content, *words)
        found = {each.dtype for each in read_model(tmp_path / "out").values()}
        return found, config_of(tmp_path / "out")["torch_dtype"]

    assert types(linear) == ({"F32"}, "float32")
    assert types({**linear, "models": listed("half", weight=1)}) == ({"BF16"}, "bfloat16")
    assert types({**linear, "dtype": "bfloat16"}) == ({"BF16"}, "bfloat16")
    assert types({**linear, "dtype": "bfloat16", "out_dtype": "float16"}) == ({"F16"}, "float16")
    assert types({**linear, "dtype": "bfloat16"}, "--output_dtype", "float32") == ({"F32"}, "float32")


def test_the_widest_type_of_two_halves_holds_both(three: dict[str, Tensors], tmp_path: Path, fuse: Any) -> None:
    for name, change in (("bf16", bf16), ("f16", lambda values: values.astype(np.float16))):
        make_model(tmp_path / name, {each: change(values) for each, values in three["b"].items()}, config=CONFIG)
    fuse(linear("bf16", "f16"))
    assert {each.dtype for each in read_model(tmp_path / "out").values()} == {"F32"}


def test_a_model_with_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fuse: Any) -> None:
    """As the base, beside its own base, and alone: the sum in float32."""
    monkeypatch.chdir(tmp_path)
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 2)
    query = "model.layers.0.self_attn.q_proj"
    low, high = factors(3, WIDTH, WIDTH)
    make_peft(tmp_path / "lora", lora(query, low, high))
    delta = 1.5 * high @ low
    name = f"{query}.weight"
    alone = fuse({"merge_method": "task_arithmetic", "base_model": "a+lora", "models": listed("a+lora")})
    np.testing.assert_allclose(alone[name], a[name] + delta, rtol=1e-5, atol=1e-6)
    both = fuse(linear("a+lora", "b"))
    np.testing.assert_allclose(both[name], (a[name] + delta + b[name]) / 2, rtol=1e-5, atol=1e-6)
    onto = fuse({"merge_method": "task_arithmetic", "base_model": "a", "models": listed("a+lora", weight=0.5)})
    np.testing.assert_allclose(onto[name], a[name] + delta / 2, rtol=1e-5, atol=1e-6)
    assert np.array_equal(onto[NORM], a[NORM])


@pytest.mark.parametrize("ties", [True, None])
def test_tied_heads_stay_tied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fuse: Any, ties: bool | None) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        model(tmp_path / name, seed, head=False, config={"tie_word_embeddings": ties})
    found = fuse(linear("a", "b"))
    assert HEAD not in found
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is ties


def test_a_head_is_untied_where_one_model_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fuse: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    a = model(tmp_path / "a", 1, head=False, config={"tie_word_embeddings": True})
    b = model(tmp_path / "b", 2)
    found = fuse(linear("a", "b"))
    np.testing.assert_allclose(found[HEAD], (a[EMBEDDING] + b[HEAD]) / 2, rtol=1e-6)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


WORDS_OF = {"a": ["<s>", "x", "y", "z"], "b": ["z", "<s>", "w", "x", "v"]}


@pytest.fixture
def vocabularies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensors]:
    """Models of two vocabularies; ``a`` has two rows of padding."""
    monkeypatch.chdir(tmp_path)
    made = {}
    for seed, (name, words) in enumerate(WORDS_OF.items()):
        files = {"tokenizer.json": json.dumps(tokenizer_json(words)),
                 "tokenizer_config.json": '{"added_tokens_decoder": {}}',
                 "generation_config.json": json.dumps({"bos_token_id": words.index("<s>")})}  # fmt: skip
        config = {"bos_token_id": words.index("<s>"), "eos_token_id": [words.index("z")]}
        made[name] = model(tmp_path / name, seed, words=len(words) + 2 * (name == "a"), files=files, config=config)
    return made


def test_a_union_of_vocabularies(vocabularies: dict[str, Tensors], fuse: Any, tmp_path: Path) -> None:
    a, b = vocabularies["a"], vocabularies["b"]
    content = {"merge_method": "task_arithmetic", "base_model": "a", "models": listed("b", weight=0.5),
               "tokenizer": {"source": "union", "pad_to_multiple_of": 8}}  # fmt: skip
    found = fuse(content)
    for name in (EMBEDDING, HEAD):
        # <s> x y z w v: what only one has is its, in both.
        rows = [(a[name][0] + b[name][1]) / 2, (a[name][1] + b[name][3]) / 2, a[name][2], (a[name][3] + b[name][0]) / 2,
                b[name][2], b[name][4]]  # fmt: skip
        np.testing.assert_allclose(found[name][:6], rows, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[name][6:], np.stack([np.mean(rows, axis=0)] * 2), rtol=1e-4, atol=1e-5)
    made = config_of(tmp_path / "out")
    assert (made["vocab_size"], made["bos_token_id"], made["eos_token_id"]) == (8, 0, [3])
    tokens = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert [(each["id"], each["content"]) for each in tokens["added_tokens"]] == [(4, "w"), (5, "v")]
    decoder = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert [each["content"] for each in decoder.values()] == ["w", "v"]
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert package.verify(tmp_path / "out", full=True).holds


def test_the_tokenizer_of_another_model(vocabularies: dict[str, Tensors], fuse: Any, tmp_path: Path) -> None:
    """Numbers of tokens in config.json and generation_config.json become those of the tokenizer."""
    found = fuse(
        {"merge_method": "linear", "base_model": "a", "models": listed("a", "b", weight=1), "tokenizer_source": "b"}
    )
    assert found[EMBEDDING].shape == (5, WIDTH)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    made = config_of(tmp_path / "out")
    assert (made["vocab_size"], made["bos_token_id"], made["eos_token_id"]) == (5, 1, [0])
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"bos_token_id": 1}


def test_rows_of_tokens_that_are_asked_for(vocabularies: dict[str, Tensors], fuse: Any) -> None:
    tokens = {"<new>": {"source": {"kind": "model_token", "model": "b", "token": "v"}},
              "x": {"source": "b", "force": True},
              "w": {"source": {"kind": "zero"}},
              "v": {"source": {"kind": "model_token", "model": "a", "token_id": 2}}}  # fmt: skip
    found = fuse({"merge_method": "linear", "base_model": "a", "models": listed("a", "b", weight=1),
                  "tokenizer": {"source": "base", "tokens": tokens}})  # fmt: skip
    a, b = (vocabularies[name][EMBEDDING] for name in "ab")
    rows = [(a[0] + b[1]) / 2, b[3], a[2], (a[3] + b[0]) / 2, b[4], b[2] / 2, (a[2] + b[4]) / 2]
    np.testing.assert_allclose(found[EMBEDDING], rows, rtol=1e-5, atol=1e-6)


def test_without_a_tokenizer_vocabularies_must_agree(
    vocabularies: dict[str, Tensors], refuse: Run, tmp_path: Path
) -> None:
    (tmp_path / "config.yml").write_text(yaml.safe_dump(linear("a", "b")))
    said = str(refuse("merge", "config.yml", "--output_path", "out"))
    assert f"{EMBEDDING} has the shapes [6, 4] in a, [5, 4] in b" in said


@pytest.mark.parametrize(
    ("wanted", "start"),
    [("chatml", "{%- for message"), ("auto", "of b {{ messages }}"), ("{{ messages }} my own template", "{{")],
)  # fmt: skip
def test_a_chat_template(vocabularies: dict[str, Tensors], fuse: Any, tmp_path: Path, wanted: str, start: str) -> None:
    (tmp_path / "b" / "chat_template.jinja").write_text("of b {{ messages }}")
    fuse(linear("a", "b", base_model="a", tokenizer_source="union", chat_template=wanted))
    text = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert text.startswith(start)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"] == text


def test_what_is_written_beside(three: dict[str, Tensors], fuse: Any, tmp_path: Path) -> None:
    (tmp_path / "a" / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# a\n")
    models = "[{model: ./a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]"
    text = f"# mine\nmerge_method: linear\nmodels: {models}\n"
    fuse(text)
    assert (tmp_path / "out" / "mergekit_config.yml").read_text() == text
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "license": "mit",
        "language": ["en"],
        "library_name": "transformers",
        "tags": ["merge", "modelfuse"],
    }
    assert text.rstrip() in card
    assert str(tmp_path) not in card
    fuse(text, "--no_model_card")
    assert not (tmp_path / "out" / "README.md").exists()


def test_a_card_has_no_text_of_strangers_but_words(three: dict[str, Tensors], fuse: Any, tmp_path: Path) -> None:
    (tmp_path / "a" / "README.md").write_text('---\nlicense: "mit\\n# Run this"\nlanguage: [en, "<script>", 3]\n---\n')
    (tmp_path / "b" / "README.md").write_text("---\nlicense: [\n---\n")
    fuse(linear("a", "b"))
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert (front.get("license"), front["language"]) == (None, ["en"])
    assert "Run this" not in (tmp_path / "out" / "README.md").read_text()


def test_the_record_of_a_merge_gives_the_same_bytes(
    three: dict[str, Tensors], fuse: Any, merge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the names of its models mean nothing."""
    fuse({"merge_method": "slerp", "base_model": "a", "models": listed("a", "b"), "parameters": {"t": [0, 1]}})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    merge(tmp_path / "out" / "merge_config.json", "--output_path", tmp_path / "again")
    for name in ("model.safetensors", "config.json", "README.md", "mergekit_config.yml"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert package.verify(tmp_path / "again", full=True).holds


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (stacked(("a", 0, 5)), (), "layer_range is [0, 5], but a has 4 layers\nhint: The end can be at most 4"),
        (stacked(("a", 0, 2)), ("--merge_method", "ties"), "merge_method cannot stand beside a configuration"),
        (stacked(("a", 0, 2)), ("--base_model_path", "a"), "base_model_path cannot stand beside a configuration"),
        (stacked(("a", 0, 2)), ("--model_path_list", "a", "b"), "names 1 models, but model_path_list has 2"),
        (stacked(("a", 0, 2)), ("--output_format", "lora"), "output_format lora cannot stand beside"),
        (linear("a", "small"), (), "different numbers of layers: 4 in a, 2 in small"),
        ({"merge_method": "linear", "models": listed("a", "b")}, (), "weight is not given for the tensor model.embed_"),
        (linear("a", "nowhere/x/y"), (), "There is no folder"),
        ({"merge_method": "linear", "models": [*listed("a", weight=1), *listed("b", weight=-1)]}, (), "sum to zero"),
        ({"merge_method": "linear", "modules": {"text": {"models": listed("a")}, "vision": {"models": listed("b")}}},
         (), "modules has text, vision, but a has a part default"),
        (linear("a+b"), (), "is given after a +, but is not an adapter"),
        (linear("a", tokenizer_source="base"), (), "has no tokenizer.json"),
        (linear("a", chat_template="chatml"), (), "has no tokenizer, so"),
        (linear("a", chat_template="chatml3"), (), "is 'chatml3', which is no name"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    three: dict[str, Tensors],
    refuse: Run,
    tmp_path: Path,
    content: dict[str, Any],
    words: tuple[str, ...],
    message: str,
) -> None:
    model(tmp_path / "small", 9, layers=2)
    (tmp_path / "config.yml").write_text(yaml.safe_dump(content))
    assert message in str(refuse("merge", "config.yml", "--output_path", "out", *words))


def test_a_tensor_that_one_model_lacks_is_told(three: dict[str, Tensors], refuse: Run, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.bias"
    make_model(
        tmp_path / "b", {**three["b"], name: np.ones(WIDTH, np.float32)}, config=CONFIG | {"num_hidden_layers": 4}
    )
    (tmp_path / "config.yml").write_text(yaml.safe_dump(linear("a", "b")))
    assert f"not in a: {name}" in str(refuse("merge", "config.yml", "--output_path", "out"))


def test_nothing_is_lost_that_all_models_have(three: dict[str, Tensors], tmp_path: Path, fuse: Any) -> None:
    """Biases, value heads and layers that predict more tokens, whatever the architecture."""
    more = ["model.layers.0.self_attn.q_proj.bias", "v_head.summary.weight", "model.layers.4.eh_proj.weight"]
    for name in "ab":
        extra = {each: np.full(WIDTH, ord(name), np.float32) for each in more}
        make_model(tmp_path / name, {**three[name], **extra},
                   config=CONFIG | {"num_hidden_layers": 4, "num_nextn_predict_layers": 1})  # fmt: skip
    found = fuse(linear("a", "b"))
    assert all((found[name] == (ord("a") + ord("b")) / 2).all() for name in more)


def test_two_stacks_have_parameters_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fuse: Any) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"{side}.block.{layer}.weight" for side in ("encoder", "decoder") for layer in range(3)]
    names += ["shared.weight", "decoder.final_layer_norm.weight"]
    made = {}
    for seed, name in enumerate("ab"):
        made[name] = {
            each: np.random.default_rng([seed, number]).standard_normal(4).astype("f4")
            for number, each in enumerate(names)
        }
        make_model(tmp_path / name, made[name], config={"model_type": "t5", "num_layers": 3, "num_decoder_layers": 3})
    models = listed("a", "b")
    content = {"merge_method": "passthrough", "modules": {
        "encoder": {"slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}]},
        "decoder": {"models": models[1:]},
        "shared": {"models": models[:1]},
    }}  # fmt: skip
    found = fuse(content)
    expected = {
        each: made["b" if each.startswith("decoder") else "a"][each]
        for each in names
        if each != "encoder.block.2.weight"
    }
    assert {name: values.tolist() for name, values in found.items()} == {
        name: values.tolist() for name, values in expected.items()
    }
    config = config_of(tmp_path / "out")
    assert (config["num_layers"], config["num_decoder_layers"]) == (2, 3)


def test_mergekits_own_command_line(three: dict[str, Tensors], modelfuse: Run, tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(yaml.safe_dump(linear("a", "b")))
    said = modelfuse("mergekit-yaml", "config.yml", "out", "--out-shard-size", "0.2K", "-j", 1, "--no-write-model-card",
                     "--allow-crimes", "--lora-merge-cache", "x", "--lazy-unpickle", "--no-copy-tokenizer", "--cuda",
                     "--allow_cpu_fallback")  # fmt: skip
    if said.status == 2:
        assert "torch" in said.err  # Where it is not installed.
        return
    assert said.status == 0, said.err
    assert "--allow-crimes has no effect here: tensors are matched by their names" in said.err
    assert not (tmp_path / "out" / "README.md").exists()
    assert not (tmp_path / "out" / "mergekit_config.yml").exists()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    close({name: array(each) for name, each in read_model(tmp_path / "out").items()},
          {name: (three["a"][name] + three["b"][name]) / 2 for name in three["a"]})  # fmt: skip


def test_a_quiet_command_says_nothing(three: dict[str, Tensors], modelfuse: Run, tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(yaml.safe_dump(linear("a", "b", normalise=1)))
    said = modelfuse("mergekit-yaml", "config.yml", "out", "--quiet", "--allow-crimes", "--memory", "1GB")
    assert (said.status, said.out, said.err) == (0, "", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("config.yml",), "mergekit-yaml needs a configuration and a folder"),
        (("config.yml", "out", "--out-shard-size", "many"), "--out-shard-size is 'many'"),
        (("config.yml", "out", "--device", "tpu"), "--device is 'tpu'"),
        (("config.yml", "out", "--densty", "1"), "There is no setting 'densty'"),
    ],
)
def test_command_lines_that_cannot_be_meant(
    three: dict[str, Tensors], refuse: Run, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "config.yml").write_text(yaml.safe_dump(linear("a", "b")))
    assert message in str(refuse("mergekit-yaml", *words))


def test_embeddings_are_cut_on_demand(vocabularies: dict[str, Tensors], modelfuse: Run, tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(yaml.safe_dump(linear("a", "b")))
    said = modelfuse("mergekit-yaml", "config.yml", "out", "--unsafe-truncate-embeddings", "--no-copy-tokenizer")
    assert said.status == 0, said.err
    a, b = (vocabularies[name] for name in "ab")
    found = read_model(tmp_path / "out")
    for name in (EMBEDDING, HEAD):
        np.testing.assert_allclose(array(found[name]), (a[name][:5] + b[name]) / 2, rtol=1e-6)
    assert config_of(tmp_path / "out")["vocab_size"] == 5
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert (tmp_path / "out" / "generation_config.json").exists()


def test_weight_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modelfuse: Run) -> None:
    monkeypatch.chdir(tmp_path)
    made = {}
    for seed, name in enumerate("ab"):
        made[name] = {"x": np.random.default_rng(seed).standard_normal(5).astype("f4")}
        make_model(tmp_path / name, made[name], config=None)
    models = [{"model": f"{name}/model.safetensors", "parameters": {"weight": 1}} for name in "ab"]
    (tmp_path / "config.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    said = modelfuse("mergekit-pytorch", "config.yml", "out")
    assert said.status == 0, said.err
    found = array(read_model(tmp_path / "out")["x"])
    np.testing.assert_allclose(found, (made["a"]["x"] + made["b"]["x"]) / 2, rtol=1e-6)


STAGED = """
name: half
merge_method: slerp
base_model: a
dtype: bfloat16
models: [{model: a}, {model: b}]
parameters: {t: 0.5}
---
name: long
merge_method: passthrough
slices:
  - sources: [{model: half, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [2, 4]}]
---
merge_method: task_arithmetic
base_model: long
models: [{model: long}, {model: other, parameters: {weight: 0.25}}]
parameters: {weight: 3}
---
name: other
merge_method: linear
models: [{model: long, parameters: {weight: 0.5}}]
parameters: {normalize: false}
"""


def by_steps(three: dict[str, Tensors], merge: Run, tmp_path: Path) -> dict[str, np.ndarray]:
    """The same one after another: each document's result in a folder of its name."""
    for document in sorted(
        yaml.safe_load_all(STAGED), key=lambda each: ["half", "long", "other", None].index(each.get("name"))
    ):
        name = document.pop("name", "last")
        (tmp_path / f"{name}.yml").write_text(yaml.safe_dump(document))
        merge(f"{name}.yml", "--output_path", name)
    return {name: array(each) for name, each in read_model(tmp_path / "last").items()}


def test_documents_use_each_others_results(
    three: dict[str, Tensors], fuse: Any, merge: Run, modelfuse: Run, tmp_path: Path
) -> None:
    found = fuse(STAGED)
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 5
    assert package.verify(tmp_path / "out", full=True).holds
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base", "config.yml", "out"]
    assert modelfuse("check", "config.yml").status == 0
    expected = by_steps(three, merge, tmp_path)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    merge(tmp_path / "out" / "merge_config.json", "--output_path", "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_a_killed_merge_of_several_documents_is_gone_on_with(
    three: dict[str, Tensors], merge: Run, tmp_path: Path
) -> None:
    (tmp_path / "config.yml").write_text(STAGED)
    words = ["config.yml", "--output_path", "out/C", "--n_process", 1]
    merge(*words)
    expected = snapshot(tmp_path / "out" / "C")
    shutil.rmtree(tmp_path / "out")
    with start("merge", *words, code=KILLED_AFTER.format(span=SPAN, spans=5), folder=tmp_path) as process:
        _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    assert "Resuming" in merge(*words).err
    assert snapshot(tmp_path / "out" / "C") == expected


def test_intermediate_results_are_kept_on_demand(
    three: dict[str, Tensors], merge: Run, modelfuse: Run, tmp_path: Path
) -> None:
    (tmp_path / "config.yml").write_text(STAGED)
    said = modelfuse("mergekit-multi", "config.yml", "--out-path", "out", "-I", "kept")
    assert said.status == 0, said.err
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["half", "long", "other"]
    assert package.verify(tmp_path / "kept" / "long", full=True).holds
    by_steps(three, merge, tmp_path)
    for name in ("half", "long", "other"):
        assert (tmp_path / "kept" / name / "model.safetensors").read_bytes() == (
            tmp_path / name / "model.safetensors"
        ).read_bytes()


def test_tokenizers_of_intermediate_results(vocabularies: dict[str, Tensors], fuse: Any, tmp_path: Path) -> None:
    union = {**linear("a", "b", base_model="a"), "name": "both", "tokenizer": {"source": "union"}}
    last = {**linear("both", "b"), "tokenizer": {"source": "union"}}
    found = fuse(yaml.safe_dump_all([union, last]))
    assert found[EMBEDDING].shape == (6, WIDTH)
    assert config_of(tmp_path / "out")["vocab_size"] == 6
    tokens = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert [each["content"] for each in tokens["added_tokens"]] == ["w", "v"]
    a, b = (vocabularies[name][EMBEDDING] for name in "ab")
    np.testing.assert_allclose(found[EMBEDDING][1], ((a[1] + b[3]) / 2 + b[3]) / 2, rtol=1e-5)


@pytest.mark.parametrize(("flag", "kept"), [("-i", ["x"]), ("-u", ["x", "y", "z"])])
def test_tensors_that_only_some_files_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modelfuse: Run, flag: str, kept: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = np.ones(3, np.float32), np.full(3, 2, np.float32)
    for name, tensors_of in (("a", {"x": one, "y": one}), ("b", {"x": two, "z": two})):
        make_model(tmp_path / name, tensors_of, config=None)
    models = [{"model": f"{name}/model.safetensors", "parameters": {"weight": 1}} for name in "ab"]
    (tmp_path / "config.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    said = modelfuse("mergekit-pytorch", "config.yml", "out", flag)
    assert said.status == 0, said.err
    found = {name: array(each)[0] for name, each in read_model(tmp_path / "out").items()}
    assert found == {name: {"x": 1.5, "y": 1.0, "z": 2.0}[name] for name in kept}
    assert ("only some models have them: y, z" in said.err) == (flag == "-i")
    said = modelfuse("mergekit-pytorch", "config.yml", "other")
    assert said.status == 2
    assert "not in b/model.safetensors: y" in said.err


def test_the_difference_of_two_models_as_an_adapter(three: dict[str, Tensors], modelfuse: Run, tmp_path: Path) -> None:
    said = modelfuse(
        "mergekit-extract-lora", "--model", "a", "--base-model", "base", "--out-path", "lora", "--max-rank", 4
    )
    assert said.status == 0, said.err
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] <= 4
    config = {"merge_method": "task_arithmetic", "base_model": "base+lora", "models": listed("base+lora")}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    assert modelfuse("merge", "config.yml", "--output_path", "out").status == 0
    query = in_layer(0)[1]
    np.testing.assert_allclose(array(read_model(tmp_path / "out")[query]), three["a"][query], rtol=1e-4, atol=1e-5)
