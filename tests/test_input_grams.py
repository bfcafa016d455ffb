"""regmean: Gram matrices of inputs from files, and `modelfuse collect`, which makes them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapting import UP, Q, adapter_of, make_base
from conftest import ROOT, Said, array, make_model, read_file, read_model, save_file

import modelfuse as package
from modelfuse.checkpoints.input_grams import KIND, open_input_grams
from modelfuse.errors import CheckpointError, MismatchError, ModelfuseError, OutputError, RecipeError
from modelfuse.inspection.collect import collect, read_texts, split
from modelfuse.planning.plan import make_plan
from modelfuse.recipe.recipe import Recipe

sys.path.insert(0, str(ROOT / "benchmarks"))

Array = np.ndarray[Any, Any]
Run = Callable[..., Said]
MODULES = {
    "layers.0.q_proj": (16, 16),
    "layers.0.down_proj": (16, 40),
    "layers.0.mlp.experts.gate_up_proj": (3, 24, 16),
}
NAMES = [name if "experts" in name else f"{name}.weight" for name in MODULES]


def values_of(seed: int) -> dict[str, Array]:
    base, draw = np.random.default_rng(99), np.random.default_rng(seed)
    shapes = dict(zip(NAMES, MODULES.values(), strict=True)) | {"norm.weight": (16,)}
    return {
        name: (base.standard_normal(shape) + (0.1 * draw.standard_normal(shape) if seed else 0)).astype(np.float32)
        for name, shape in shapes.items()
    }


def grams_of(seed: int) -> dict[str, Array]:
    """Gram matrices of fifty rows of inputs, of every expert if there are some; correlated."""
    draw, found = np.random.default_rng(50 + seed), {}
    for name, shape in MODULES.items():
        units, inputs = (shape[0] if len(shape) == 3 else 1), shape[-1]
        rows = draw.standard_normal((units, 50, inputs)) @ draw.standard_normal((inputs, inputs))
        gram = rows.transpose(0, 2, 1) @ rows
        found[name] = (gram if len(shape) == 3 else gram[0]).astype(np.float32)
    return found


def save_grams(path: Path, grams: Mapping[str, Array], model: str, **metadata: str) -> Path:
    save_file(path, grams, {"kind": KIND, "model": model, "tokens": "50", **metadata})
    return path


@pytest.fixture
def request_(tmp_path: Path) -> dict[str, Any]:
    config = {"model_type": "llama", "hidden_size": 16}
    folders = [make_model(tmp_path / f"m{seed}", values_of(seed), config=config) for seed in range(4)]
    files = [save_grams(tmp_path / f"grams{seed}.safetensors", grams_of(seed), f"m{seed}") for seed in (1, 2, 3)]
    return {"model_path_list": folders[1:], "base_model_path": folders[0], "merge_method": "regmean",
            "gram_list": files, "lambda": 1}  # fmt: skip


def regmean(taus: Sequence[Array], grams: Sequence[Array], weights: Sequence[float] = (1, 1, 1)) -> Array:
    """By its definition."""
    shrunk = [0.9 * each + 0.1 * np.diag(np.diag(each)) for each in grams]
    whole = np.sum(shrunk, 0)
    whole += 1e-6 * np.trace(whole) / len(whole) * np.eye(len(whole))
    scaled = [3 * weight / sum(weights) * tau for weight, tau in zip(weights, taus, strict=True)]
    result: Array = np.sum([tau @ gram for tau, gram in zip(scaled, shrunk, strict=True)], 0) @ np.linalg.inv(whole)
    return result


def expected(weights: Sequence[float] = (1, 1, 1)) -> dict[str, Array]:
    base, *models = ({name: each.astype(np.float64) for name, each in values_of(seed).items()} for seed in range(4))
    grams = [grams_of(seed) for seed in (1, 2, 3)]
    found = {"norm.weight": np.average([each["norm.weight"] for each in models], axis=0, weights=weights)}
    for module, name in zip(MODULES, NAMES, strict=True):
        taus = [each[name] - base[name] for each in models]
        own = [each[module].astype(np.float64) for each in grams]
        if base[name].ndim == 3:
            merged = np.stack([regmean(*pair, weights) for pair in zip(zip(*taus), zip(*own), strict=True)])  # noqa: B905
        else:
            merged = regmean(taus, own, weights)
        found[name] = base[name] + merged
    return found


def outcome(folder: Path, request: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    package.merge(**{**request, **settings}, output_path=folder)
    return read_model(folder)


@pytest.mark.parametrize("weights", [None, [1, 2, 0.5]])
def test_matrices_are_merged_as_defined(tmp_path: Path, request_: dict[str, Any], weights: list[float] | None) -> None:
    found = outcome(tmp_path / "out", request_, weight_list=weights)
    for name, values in expected(weights or (1, 1, 1)).items():
        np.testing.assert_allclose(array(found[name]), values, atol=1e-5, err_msg=name)
    assert outcome(tmp_path / "one", request_, weight_list=weights, n_process=1, memory=1) == found


def test_a_share_of_the_norm_is_the_default(tmp_path: Path, request_: dict[str, Any]) -> None:
    del request_["lambda"]
    found = outcome(tmp_path / "out", request_)
    base, *models = (values_of(seed)["layers.0.q_proj.weight"].astype(np.float64) for seed in range(4))
    made = array(found["layers.0.q_proj.weight"]) - base
    assert np.linalg.norm(made) == pytest.approx(0.6 * np.linalg.norm(np.sum(models, 0) - 3 * base), rel=1e-4)


def test_paddles_layout_gives_the_same(tmp_path: Path, request_: dict[str, Any]) -> None:
    """Inputs are the rows there."""
    names, config = NAMES[:2], {"model_type": "llama", "hidden_size": 16}
    for seed in range(4):
        turned = {name: values_of(seed)[name].T.copy() for name in names}
        make_model(tmp_path / "pd" / f"m{seed}", turned, config=config)
    folders = [tmp_path / "pd" / f"m{seed}" for seed in range(4)]
    found = outcome(tmp_path / "out", {**request_, "model_path_list": folders[1:], "base_model_path": folders[0]},
                    input_layout=["paddle"])  # fmt: skip
    for name in names:
        np.testing.assert_allclose(array(found[name]).T, expected()[name], atol=1e-5)


def test_experts_that_no_model_used_are_averaged(tmp_path: Path, request_: dict[str, Any]) -> None:
    for seed, path in zip((1, 2, 3), request_["gram_list"], strict=True):
        grams = grams_of(seed)
        grams["layers.0.mlp.experts.gate_up_proj"][1] = 0
        save_grams(path, grams, f"m{seed}")
    name = "layers.0.mlp.experts.gate_up_proj"
    found = array(outcome(tmp_path / "out", request_)[name])
    np.testing.assert_allclose(found[1], np.mean([values_of(seed)[name][1] for seed in (1, 2, 3)], 0), atol=1e-6)
    np.testing.assert_allclose(found[2], expected()[name][2], atol=1e-5)


def test_experts_stored_one_by_one_take_theirs_of_the_tensor_of_all(tmp_path: Path) -> None:
    whole = {f"model.layers.0.mlp.experts.{part}": np.stack([np.eye(4, dtype=np.float32) * each for each in (1, 2)])
             for part in ("gate_up_proj", "down_proj")}  # fmt: skip
    found = open_input_grams(save_grams(tmp_path / "grams.safetensors", whole, "m"))
    for name in ("block_sparse_moe.experts.1.w1", "mlp.experts.1.down_proj"):
        gram = found.of(f"model.layers.0.{name}.weight")
        assert gram is not None
        assert gram.shape == (4, 4)
        room = np.empty(16, np.float32)
        with gram.open() as read:
            read(0, room.view(np.uint8).data)
        np.testing.assert_array_equal(room.reshape(4, 4), 2 * np.eye(4))
    assert found.of("model.layers.0.mlp.experts.2.down_proj.weight") is None
    assert found.of("model.layers.1.mlp.experts.0.down_proj.weight") is None


def test_verify_holds_and_tells_of_files_that_changed(tmp_path: Path, request_: dict[str, Any], modelfuse: Run) -> None:
    outcome(tmp_path / "out", request_)
    assert package.verify(tmp_path / "out", full=True).holds
    notes = "\n".join(package.check(**request_).notes)
    assert "Gram matrices for m2: grams2.safetensors, collected from m2 over 50 tokens." in notes
    (report,) = (json.loads((tmp_path / "out" / "merge_report.json").read_text()),)
    assert [Path(each["path"]).name for each in report["grams"]] == [f"grams{seed}.safetensors" for seed in (1, 2, 3)]
    path = request_["gram_list"][0]
    save_grams(path, {name: each * 2 for name, each in grams_of(2).items()}, "m1")
    found = package.verify(tmp_path / "out", full=True)
    assert [each.kind for each in found.problems] == [*["bytes"] * len(MODULES), "inputs"]
    path.unlink()
    assert "grams1.safetensors is missing" in modelfuse("verify", tmp_path / "out", "--full").err


def test_a_merge_goes_on_with_the_same_files_only(request_: dict[str, Any]) -> None:
    from modelfuse.execution.resume import facts_of

    request = {**request_, "output_path": None}
    before = facts_of(make_plan(Recipe.parse(request)))
    assert facts_of(make_plan(Recipe.parse(request))) == before
    save_grams(request_["gram_list"][1], {name: each * 2 for name, each in grams_of(2).items()}, "m2")
    after = facts_of(make_plan(Recipe.parse(request)))
    assert {name for name in before if before[name] != after[name]} == {str(request_["gram_list"][1])}


def test_an_adapter_of_it_is_the_same(tmp_path: Path, request_: dict[str, Any]) -> None:
    names = NAMES[:2]
    for seed in range(4):
        make_model(tmp_path / f"m{seed}", {name: values_of(seed)[name] for name in names})
    package.merge(**request_, output_path=tmp_path / "lora", output_format="lora", lora_rank=16)
    found = outcome(tmp_path / "out", {"lora_model_path": tmp_path / "lora", "base_model_path": tmp_path / "m0"})
    for name in names:
        np.testing.assert_allclose(array(found[name]), expected()[name], atol=1e-4)


def test_adapters_are_merged_in_full(tmp_path: Path) -> None:
    """Inputs that were seen are no product of the adapters' factors, which other methods would stay within."""
    base, _ = make_base(tmp_path / "base")
    adapters = [adapter_of(tmp_path / name, seed, Q, UP)[0] for seed, name in enumerate("AB")]
    grams = {module: np.diag(np.arange(1, 9, dtype=np.float32)) + 1 for module in (Q, UP)}
    files = [save_grams(tmp_path / f"{path.name}.safetensors", {name: each * (at + 1) for name, each in grams.items()},
                        path.name) for at, path in enumerate(adapters)]  # fmt: skip
    request: dict[str, Any] = {
        "merge_method": "regmean",
        "model_path_list": adapters,
        "base_model_path": base,
        "gram_list": files,
    }
    found = outcome(tmp_path / "whole", request)
    package.merge(**request, output_path=tmp_path / "lora", output_format="lora", lora_rank=8)
    again = outcome(tmp_path / "again", {"lora_model_path": tmp_path / "lora", "base_model_path": base})
    for name in found:
        np.testing.assert_allclose(array(found[name]), array(again[name]), atol=1e-5)


def test_rules_may_have_it_for_some_tensors(tmp_path: Path, request_: dict[str, Any]) -> None:
    rules = [{"tensors": "*down_proj*", "merge_method": "regmean"}]
    found = outcome(tmp_path / "out", {**request_, "merge_method": "linear"}, rules=rules)
    name = "layers.0.down_proj.weight"
    np.testing.assert_allclose(array(found[name]), expected()[name], atol=1e-5)
    name = "layers.0.q_proj.weight"
    np.testing.assert_allclose(array(found[name]), np.mean([values_of(seed)[name] for seed in (1, 2, 3)], 0), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "says", "hint"),
    [
        ({"gram_list": []}, "regmean takes Gram matrices of the models' inputs, but gram_list is not given", "collect"),
        ({"gram_list": ["a.st"]}, "gram_list names 1 files for 3 models", "one per model"),
        ({"merge_method": "linear"}, "gram_list is given, but no method takes Gram matrices", "regmean"),
        ({"merge_method": "regmean", "regmean_shrink": 2}, "regmean_shrink is 2", ""),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    request_: dict[str, Any], changes: dict[str, Any], says: str, hint: str
) -> None:
    with pytest.raises(RecipeError, match=says) as error:
        Recipe.parse({**request_, **changes})
    assert hint in (error.value.hint or "")


def _without(grams: dict[str, Array]) -> dict[str, Array]:
    return {name: each for name, each in grams.items() if "down" not in name}


@pytest.mark.parametrize(
    ("changed", "model", "kind", "says"),
    [
        (_without, "m2", MismatchError, r"layers\.0\.down_proj\.weight in .*grams2"),
        (lambda grams: {name.replace("layers", "blocks"): each for name, each in grams.items()}, "m2", MismatchError,
         r"no fitting Gram matrices"),
        (lambda grams: {**grams, "layers.0.down_proj": np.eye(16, dtype=np.float32)}, "m2", MismatchError,
         r"grams2.* has the shape \[16, 16\], needed is \[40, 40\]"),
        (lambda grams: {**grams, "layers.0.q_proj": np.eye(16, dtype=np.int32)}, "m2", CheckpointError,
         r"layers\.0\.q_proj is I32 \[16, 16\]"),
        (lambda grams: grams, "m3", MismatchError, r"grams2.* was collected from m3, but gram_list gives it for m2"),
    ],
    ids=["a module is missing", "another model's", "another shape", "no floats", "another order"],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(
    tmp_path: Path, request_: dict[str, Any], changed: Any, model: str, kind: type[ModelfuseError], says: str
) -> None:
    save_grams(request_["gram_list"][1], changed(grams_of(2)), model)
    with pytest.raises(kind, match=says) as error:
        package.merge(**request_, output_path=tmp_path / "out")
    assert error.value.hint
    assert not (tmp_path / "out").exists()


def test_what_is_no_such_file_is_refused(tmp_path: Path, request_: dict[str, Any]) -> None:
    request_["gram_list"][0] = tmp_path / "m1" / "model.safetensors"
    with pytest.raises(CheckpointError, match="holds no Gram matrices of a model's inputs"):
        package.check(**request_)
    request_["gram_list"][0] = tmp_path / "none.safetensors"
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        package.check(**request_)


# What makes them -----------------------------------------------------------------------------------------------------


def test_texts_are_read_from_lines(tmp_path: Path) -> None:
    lines = ['"one"', "", '{"text": "two"}', '{"prompt": "three"}', '{"messages": [{"role": "user", "content": "x"}]}']
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(lines))
    assert read_texts(path) == ["one", "two", "three", [{"role": "user", "content": "x"}]]
    plain = tmp_path / "text.txt"
    plain.write_text("a\nb")
    assert read_texts(plain) == ["a\nb"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"text": "a"}\n{', "line 2"),
        ('{"label": 1}', "line 1: there is no text"),
        ("", "holds no text"),
        ("\udcff", "cannot be read"),
    ],
)
def test_texts_that_are_none_are_refused(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(RecipeError, match=says):
        read_texts(path)


MODEL = ROOT / "demo" / "models" / "base"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    content = (ROOT / "demo" / "heldout" / "prose.txt").read_text(encoding="utf-8")
    path.write_text("\n".join(json.dumps({"text": content[at : at + 600]}) for at in range(0, 20_000, 2000)))
    return path


@pytest.fixture
def transformers() -> Any:
    pytest.importorskip("torch", reason="collect runs models with torch")
    return pytest.importorskip("transformers", reason="collect opens models with transformers")


def test_a_model_is_collected_from_and_merged(tmp_path: Path, texts: Path, modelfuse: Run, transformers: Any) -> None:
    """The same as the demo's own forward pass sees; and what a merge takes."""
    from quality.grams import Observed

    output = tmp_path / "grams.safetensors"
    said = modelfuse("collect", MODEL, "--data", texts, "--output", output, "--tokens", 200, "--json")
    assert said.status == 0, said.err
    assert json.loads(said.out) == {"modelfuse_version": package.__version__, "document": "collect/1",
                                    "output": str(output), "modules": 29, "tokens": 200}  # fmt: skip
    found, metadata = read_file(output)
    aliases = json.loads(metadata.pop("aliases"))
    assert metadata == {"format": "pt", "kind": KIND, "model": "base", "tokens": "200"}
    assert aliases == {
        f"model.layers.{layer}.{name}": f"model.layers.{layer}.{same}" for layer in range(4)
        for name, same in (("self_attn.k_proj", "self_attn.q_proj"), ("self_attn.v_proj", "self_attn.q_proj"),
                           ("mlp.up_proj", "mlp.gate_proj"))
    }  # fmt: skip
    found |= {name: found[same] for name, same in aliases.items()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    observed, left = Observed(MODEL), 200
    for text in read_texts(texts):
        row = tokenizer(text)["input_ids"][: min(50, left)]
        observed.logits(np.array([row]))
        left -= len(row)
        if not left:
            break
    for name, gram in observed.grams.items():
        np.testing.assert_allclose(array(found[name]), gram, rtol=1e-3, atol=1e-3 * np.abs(gram).max())
    names = ("code", "prose")
    files = [save_grams(tmp_path / name, {key: array(each) for key, each in found.items()}, name) for name in names]
    package.merge(merge_method="regmean", base_model_path=MODEL, gram_list=files, output_path=tmp_path / "out",
                  model_path_list=[MODEL.parent / name for name in names])  # fmt: skip


def test_within_a_budget_parts_are_summed_one_after_the_other(tmp_path: Path, texts: Path, transformers: Any) -> None:
    for name, memory in (("whole", "1GB"), ("parts", 4 * 576**2)):
        collect(MODEL, texts, tmp_path / name, tokens=50, memory=memory)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    with pytest.raises(RecipeError, match=r"memory is 100 kB, but the Gram matrix of model\.layers\.0\."):
        collect(MODEL, texts, tmp_path / "none", tokens=50, memory="100kB")
    with pytest.raises(RecipeError, match="memory is 'much': give a size"):
        collect(MODEL, texts, tmp_path / "none", tokens=50, memory="much")
    assert not (tmp_path / "none").exists()
    assert split({"a": (1, 4, 4), "b": (2, 4, 4), "c": (1, 2, 2)}, 140) == [["a"], ["b"], ["c"]]
    assert split({"a": (1, 4, 4), "b": (1, 4, 4), "c": (1, 2, 2)}, 140) == [["a", "b"], ["c"]]


def test_only_modules_that_never_had_other_inputs_share_a_matrix() -> None:
    torch = pytest.importorskip("torch", reason="sees what torch multiplies")
    from modelfuse.inspection.seen_inputs import SeenInputs

    model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in "abcdef"})
    seen, x = SeenInputs(torch, model), torch.randn(5, 3)

    def run() -> None:
        y = x.clone()
        for name in "abc":
            model[name](y)
        y += 1  # The same tensor, with other elements.
        for name in "cde":
            model[name](y)
        model["f"](y[:4])

    with seen.watching(sums=False):
        run()
    assert seen.aliases == {"b": "a", "e": "d"}
    assert not seen.grams
    with seen.watching(["a", "c"]):
        run()
    assert seen.grams.keys() == {"a", "c"}
    torch.testing.assert_close(seen.grams["c"][0], x.T @ x + (x + 1).T @ (x + 1))


@pytest.mark.parametrize("aliases", ["[]", "{", '{"x": "none"}', '{"model.layers.0.mlp.up_proj": 3}'])
def test_aliases_of_nothing_are_refused(tmp_path: Path, aliases: str) -> None:
    path = save_grams(tmp_path / "x", {"model.layers.0.mlp.gate_proj": np.eye(3)}, "A", aliases=aliases)
    with pytest.raises(CheckpointError, match="no valid `aliases`"):
        open_input_grams(path)


def _model_of(transformers: Any, kind: str, folder: Path) -> Path:
    config: Any = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    if kind == "GPT2LMHeadModel":
        made = transformers.GPT2Config(vocab_size=1024, n_embd=32, n_layer=1, n_head=4)
    elif kind == "MixtralForCausalLM":
        made = transformers.MixtralConfig(**config, intermediate_size=48, num_key_value_heads=2, num_local_experts=3,
                                          num_experts_per_tok=2)  # fmt: skip
    else:
        made = transformers.GptOssConfig(**config, intermediate_size=48, num_key_value_heads=2, num_local_experts=3,
                                         num_experts_per_tok=2, head_dim=8)  # fmt: skip
    getattr(transformers, kind)(made).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    return folder


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "MixtralForCausalLM", "GptOssForCausalLM"])
def test_any_architecture_is_collected_from(tmp_path: Path, texts: Path, transformers: Any, kind: str) -> None:
    """Transposed layers, experts in one tensor (one by one in the file), experts stored as [in, out]."""
    folders = [_model_of(transformers, kind, tmp_path / name) for name in ("base", "A", "B")]
    files = [tmp_path / f"{folder.name}.safetensors" for folder in folders[1:]]
    for folder, file in zip(folders[1:], files, strict=True):
        collect(folder, texts, file, tokens=100)
    package.merge(merge_method="regmean", base_model_path=folders[0], model_path_list=folders[1:], gram_list=files,
                  output_path=tmp_path / "out")  # fmt: skip
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    methods = {name: report["methods"][each["method"] - 1]["merge_type"] for name, each in report["tensors"].items()
               if "method" in each}  # fmt: skip
    assert sum(each == "regmean" for each in methods.values()) >= 4


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's, of transformers
def test_an_adapter_is_collected_from_by_the_names_of_its_base(tmp_path: Path, texts: Path, transformers: Any) -> None:
    peft = pytest.importorskip("peft", reason="adapters run with peft")
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM.from_pretrained(MODEL), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "lora")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path / "lora")
    collect(tmp_path / "lora", texts, tmp_path / "lora.safetensors", tokens=50)
    collect(MODEL, texts, tmp_path / "base.safetensors", tokens=50)
    assert read_file(tmp_path / "lora.safetensors")[0].keys() == read_file(tmp_path / "base.safetensors")[0].keys()


def test_convolutions_are_the_products_that_they_are() -> None:
    torch = pytest.importorskip("torch", reason="sees what torch multiplies")
    from modelfuse.inspection.seen_inputs import SeenInputs

    class Small(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.flat = torch.nn.Conv1d(3, 5, 4, stride=2, padding=1)
            self.wide = torch.nn.Conv2d(2, 6, (3, 2), stride=2, padding=1)

    model = Small()
    seen = SeenInputs(torch, model)
    one, two = torch.randn(2, 3, 11), torch.randn(2, 2, 8, 7)
    with seen.watching():
        outputs = {"flat": model.flat(one), "wide": model.wide(two)}
    for name, output in outputs.items():
        layer = getattr(model, name).requires_grad_(False)
        rows = layer.weight.reshape(layer.weight.shape[0], -1)
        plain = output - layer.bias.reshape(1, -1, *[1] * (output.ndim - 2))
        assert float((plain**2).sum()) == pytest.approx(float(((rows @ seen.grams[name][0]) * rows).sum()), rel=1e-4)


def test_what_cannot_be_collected_is_refused(tmp_path: Path, texts: Path, refuse: Run, transformers: Any) -> None:
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"mine")
    refuse("collect", MODEL, "--data", texts, "--output", there, says=["there.safetensors exists"], hint="--overwrite")
    refuse("collect", MODEL, "--data", texts, "--output", tmp_path / "no" / "x", says=["There is no folder"])
    refuse("collect", MODEL, "--data", tmp_path / "none.jsonl", "--output", tmp_path / "x", says=["none.jsonl"])
    refuse("collect", MODEL, "--output", tmp_path / "x", says=["--data"])
    refuse("collect", MODEL, "--data", texts, "--output", tmp_path / "x", "--tokens", 0, says=["at least 1"])
    refuse("collect", tmp_path / "none", "--data", texts, "--output", tmp_path / "x", says=["There is no folder"])


def test_without_the_libraries_the_extra_is_named(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelfuse.planning import optional_packages

    monkeypatch.setattr(optional_packages, "find_spec", lambda name: None)
    with pytest.raises(ModelfuseError, match="torch") as error:
        collect(MODEL, texts, tmp_path / "x")
    assert "[calibrate]" in str(error.value.hint)
    with pytest.raises(OutputError, match="exists"):
        collect(MODEL, texts, texts)
