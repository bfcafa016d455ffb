"""Hugging Face's and Paddle's layouts: told apart, mixed, converted, and loaded by the libraries of both worlds."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Said, Stored, array, bf16, make_model, read_file, read_model, snapshot

from modelfuse.checkpoints import open_checkpoint
from modelfuse.checkpoints.formats.paddle_writer import frame_paddle
from modelfuse.dtypes import BY_NAME
from modelfuse.errors import RecipeError

Run = Callable[..., Said]
Refuse = Callable[..., str]
Model = dict[str, np.ndarray]

FIXTURES = Path(__file__).parent / "fixtures" / "layouts"
KINDS = ["llama", "qwen2", "qwen3"]
HIDDEN, HEADS, GROUPS, WIDTH, INNER, VOCAB = 8, 4, 2, 3, 10, 12
CONFIG = {
    "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": WIDTH,
    "intermediate_size": INNER, "vocab_size": VOCAB, "num_hidden_layers": 2, "tie_word_embeddings": False,
}  # fmt: skip
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def hf_model(seed: int) -> Model:
    """A decoder in Hugging Face's layout."""
    draw = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(2):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.self_attn.q_proj.weight": (HEADS * WIDTH, HIDDEN),
            f"{name}.self_attn.q_proj.bias": (HEADS * WIDTH,),
            f"{name}.self_attn.k_proj.weight": (GROUPS * WIDTH, HIDDEN),
            f"{name}.self_attn.k_proj.bias": (GROUPS * WIDTH,),
            f"{name}.self_attn.v_proj.weight": (GROUPS * WIDTH, HIDDEN),
            f"{name}.self_attn.v_proj.bias": (GROUPS * WIDTH,),
            f"{name}.self_attn.o_proj.weight": (HIDDEN, HEADS * WIDTH),
            f"{name}.mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{name}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"{name}.mlp.down_proj.weight": (HIDDEN, INNER),
            f"{name}.input_layernorm.weight": (HIDDEN,),
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def is_linear(name: str) -> bool:
    return name.endswith(".weight") and name.split(".")[-2] in LINEAR


def transposed(model: Model) -> Model:
    """PaddleFormers' layout of an architecture that it keeps split."""
    return {name: each.T.copy() if is_linear(name) else each for name, each in model.items()}


def nlp_model(model: Model, architecture: str = "llama") -> Model:
    """PaddleNLP's names and layout."""
    named = {name.replace("model.", f"{architecture}.", 1): each for name, each in transposed(model).items()}
    return named | {"lm_head.weight": model["lm_head.weight"].T.copy()}


def interleave(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """One fused weight or bias from [out, in] ones, group by group, as the forward pass takes it apart."""
    parts = [each.reshape(GROUPS, -1, *each.shape[1:]) for each in (query, key, value)]
    whole = np.concatenate(parts, axis=1)
    return np.ascontiguousarray(whole.reshape(-1, *query.shape[1:]).T)


def fused(model: Model, ffn: str = "up_gate_proj") -> Model:
    """PaddleFormers' layout of Qwen2, from Hugging Face's."""
    made: Model = {}
    for name, each in transposed(model).items():
        layer = name.rpartition(".self_attn.")[0] or name.rpartition(".mlp.")[0]
        parameter = name.rpartition(".")[2]
        if ".q_proj." in name:
            parts = [model[f"{layer}.self_attn.{part}_proj.{parameter}"] for part in "qkv"]
            made[f"{layer}.self_attn.qkv_proj.{parameter}"] = interleave(*parts)
        elif ".gate_proj." in name:
            parts = [model[f"{layer}.mlp.{part}_proj.{parameter}"] for part in ("gate", "up")]
            made[f"{layer}.mlp.{ffn}.{parameter}"] = np.ascontiguousarray(np.concatenate(parts).T)
        elif not any(f".{part}_proj." in name for part in ("k", "v", "up")):
            made[name] = each
    return made


def save(folder: Path, model: Mapping[str, np.ndarray | Stored], architecture: str = "llama", **config: object) -> Path:
    return make_model(folder, model, config={"model_type": architecture, **CONFIG, **config})


def save_pdparams(folder: Path, model: Model, architecture: str = "llama", **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": architecture, **CONFIG, **config}))
    (folder / "model_state.pdparams").write_bytes(pickle.dumps(model, 4))
    return folder


def values(folder: Path) -> Model:
    return {name: array(each) for name, each in read_model(folder).items()}


def same(one: Mapping[str, np.ndarray], two: Mapping[str, np.ndarray]) -> bool:
    return set(one) == set(two) and all(
        one[name].shape == two[name].shape and one[name].tobytes() == two[name].tobytes() for name in one
    )


def read_pdparams(folder: Path) -> Model:
    """What Python's own unpickler makes of the files; they were written a moment ago by the test itself."""
    found: Model = {}
    for path in sorted(folder.glob("*.pdparams")):
        with open(path, "rb") as file:
            found |= pickle.load(file)
    return found


def fixture(kind: str, folder: Path) -> tuple[Path, Path]:
    """PaddleFormers' two files of one model as two folders: Paddle's layout, Hugging Face's."""
    config = json.loads((FIXTURES / kind / "config.json").read_text())
    for name in ("paddle", "hf"):
        (folder / name).mkdir()
    (folder / "paddle" / "model_state.pdparams").write_bytes((FIXTURES / kind / "model_state.pdparams").read_bytes())
    (folder / "paddle" / "config.json").write_text(json.dumps(config))
    (folder / "hf" / "model.safetensors").write_bytes((FIXTURES / kind / "hf.safetensors").read_bytes())
    del config["source"]
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    return folder / "paddle", folder / "hf"


@pytest.mark.parametrize("kind", KINDS)
def test_paddle_becomes_what_paddleformers_itself_saves_for_hugging_face(
    merge: Run, modelfuse: Run, tmp_path: Path, kind: str
) -> None:
    paddle, hf = fixture(kind, tmp_path)
    merge("--model_path_list", paddle, paddle, "--output_path", tmp_path / "C", "--output_format", "hf")
    assert same(values(tmp_path / "C"), values(hf))
    assert read_file(tmp_path / "C" / "model.safetensors")[1] == {"format": "pt"}
    config = json.loads((tmp_path / "C" / "config.json").read_text())
    assert "source" not in config
    assert (config["torch_dtype"], config["dtype"]) == ("float32", "float32")
    assert modelfuse("verify", tmp_path / "C", "--full").status == 0


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_becomes_what_paddleformers_itself_saves_for_paddle(
    merge: Run, modelfuse: Run, tmp_path: Path, kind: str
) -> None:
    paddle, hf = fixture(kind, tmp_path)
    with open(paddle / "model_state.pdparams", "rb") as file:
        expected = pickle.load(file)
    expected.pop("StructuredToParameterName@@")
    for form in ("paddle", "pdparams"):
        out = tmp_path / form
        out = tmp_path / f"{form}-out"
        merge("--model_path_list", hf, hf, "--output_path", out, "--output_format", form)
        assert same(values(out) if form == "paddle" else read_pdparams(out), expected)
        assert json.loads((out / "config.json").read_text())["source"] == "paddle"
        assert modelfuse("verify", out, "--full").status == 0
    assert read_file(tmp_path / "paddle-out" / "model.safetensors")[1] == {"format": "np"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["paddle", "pdparams"])
def test_there_and_back_again_gives_the_same_bytes(merge: Run, tmp_path: Path, kind: str, form: str) -> None:
    _, hf = fixture(kind, tmp_path)
    merge("--model_path_list", hf, hf, "--output_path", tmp_path / "plain")
    merge("--model_path_list", hf, hf, "--output_path", tmp_path / "there", "--output_format", form)
    merge("--model_path_list", *[tmp_path / "there"] * 2, "--output_path", tmp_path / "back", "--save_to_hf")
    assert same(values(tmp_path / "back"), values(tmp_path / "plain"))
    if kind == "llama":  # What was fused comes out in the order of its parts, which need not be the file's before.
        back, plain = (tmp_path / name / "model.safetensors" for name in ("back", "plain"))
        assert back.read_bytes() == plain.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_paddleformers_logits(merge: Run, tmp_path: Path, kind: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    paddle, hf = fixture(kind, tmp_path)
    merge("--model_path_list", paddle, hf, "--output_path", tmp_path / "C", "--output_format", "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "C", dtype=torch.float32)
    with torch.no_grad():
        logits = model.eval()(torch.arange(3, 15)[None]).logits.numpy()  # type: ignore[no-untyped-call]
    np.testing.assert_allclose(logits, np.load(FIXTURES / kind / "logits.npy"), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("world", ["paddle", "pdparams", "nlp"])
def test_mistral_says_the_same_whichever_world_it_comes_from(merge: Run, tmp_path: Path, world: str) -> None:
    """PaddleFormers' layout of it is Llama's, so what Paddle would save is made of what transformers saves."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    settings: dict[str, Any] = {**CONFIG, "head_dim": 4, "hidden_size": 16}
    config = MistralConfig(**settings, sliding_window=4, initializer_range=0.3)
    tokens = torch.arange(2, 12)[None]
    with torch.no_grad():
        made = MistralForCausalLM(config).eval()  # type: ignore[no-untyped-call]
        logits = made(tokens).logits.numpy()
    made.save_pretrained(tmp_path / "hf")
    known = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert known.pop("model_type") == "mistral"
    model = values(tmp_path / "hf")
    theirs = nlp_model(model, "mistral") if world == "nlp" else transposed(model)
    store = save_pdparams if world == "pdparams" else save
    source = {} if world == "nlp" else {"source": "paddle"}
    paddle = store(tmp_path / "theirs", theirs, "mistral", **known | source)
    for number, inputs in enumerate([(paddle, paddle), (tmp_path / "hf", paddle)]):
        out = tmp_path / f"C{number}"
        merge("--model_path_list", *inputs, "--output_path", out, "--output_format", "hf")
        assert same(values(out), model)
        with torch.no_grad():
            again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
            np.testing.assert_array_equal(again(tokens).logits.numpy(), logits)
    hf = tmp_path / "hf"  # Alone: then the names in the other world are those that the table knows.
    merge("--model_path_list", hf, hf, "--output_path", tmp_path / "back", "--output_format", "paddle")
    assert same(values(tmp_path / "back"), transposed(model))


def paddleformers() -> str | None:
    """A Python that has PaddleFormers: this one, or the one that the environment names."""
    named = os.environ.get("MODELFUSE_PADDLEFORMERS_PYTHON")
    return named or (sys.executable if importlib.util.find_spec("paddleformers") else None)


@pytest.mark.skipif(
    paddleformers() is None,
    reason="PaddleFormers wants an older transformers: name a Python that has it in MODELFUSE_PADDLEFORMERS_PYTHON",
)
@pytest.mark.parametrize("form", ["paddle", "pdparams"])
@pytest.mark.parametrize("kind", KINDS)
def test_paddleformers_loads_what_comes_out(merge: Run, tmp_path: Path, kind: str, form: str) -> None:
    paddle, hf = fixture(kind, tmp_path)
    sharded = ("--max_shard_size", "9KB") if kind == "qwen2" else ()
    merge("--model_path_list", hf, paddle, "--output_path", tmp_path / "C", "--output_format", form, *sharded)
    command = [paddleformers(), FIXTURES / "paddleformers_models.py", "logits", tmp_path / "C", tmp_path / "logits.npy"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(
        np.load(tmp_path / "logits.npy"), np.load(FIXTURES / kind / "logits.npy"), atol=1e-6, rtol=1e-6
    )


def test_paddle_loads_pdparams(merge: Run, tmp_path: Path) -> None:
    paddle = pytest.importorskip("paddle")
    models = []
    for seed in (1, 2):
        model: dict[str, np.ndarray | Stored] = {name: bf16(each) for name, each in hf_model(seed).items()}
        model["model.counts"] = np.arange(5, dtype=np.int64) - 2
        model["model.flag"] = np.array([True, False])
        model["model.scalar"] = np.array(3, np.int32)
        models.append(save(tmp_path / f"{seed}", model))
    merge("--model_path_list", *models, "--output_path", tmp_path / "C", "--output_format", "pdparams")
    merge("--model_path_list", *models, "--output_path", tmp_path / "D", "--output_format", "paddle")
    loaded = paddle.load(str(tmp_path / "C" / "model_state.pdparams"))
    expected = read_model(tmp_path / "D")
    assert set(loaded) == set(expected)
    for name, stored in expected.items():
        tensor = loaded[name]
        assert tuple(tensor.shape) == stored.shape
        assert str(tensor.dtype).endswith(str(BY_NAME[stored.dtype]))
        assert np.array_equal(tensor.astype("float32").numpy(), array(stored).astype(np.float32))


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "slerp"])
@pytest.mark.parametrize("lead", range(5))
def test_merging_both_kinds_is_merging_in_one(merge: Run, tmp_path: Path, method: str, lead: int) -> None:
    """Whatever each input is, the output is what its base's layout gives of the same models."""
    models = [hf_model(seed) for seed in range(3)]
    if method == "slerp":
        models.pop()
    forms: list[Callable[[Path, Model], Path]] = [
        lambda path, model: save(path, model, "qwen2"),
        lambda path, model: save(path, transposed(model), "qwen2", source="paddle"),
        lambda path, model: save_pdparams(path, fused(model), "qwen2"),
        lambda path, model: save(path, fused(nlp_model_inverse(model), "gate_up_fused_proj"), "qwen2", source="paddle"),
        lambda path, model: save(path, nlp_model(model, "qwen2"), "qwen2"),
    ]
    mixed = [forms[(lead + 1 + number) % 5](tmp_path / f"m{number}", each) for number, each in enumerate(models)]
    plain = [forms[lead](tmp_path / f"p{number}", each) for number, each in enumerate(models)]
    base = forms[lead](tmp_path / "base", hf_model(9))
    options = ("--merge_method", method, "--base_model_path", base, "--n_process", 2)
    merge("--model_path_list", *mixed, *options, "--output_path", tmp_path / "mixed")
    merge("--model_path_list", *plain, *options, "--output_path", tmp_path / "plain")
    assert (tmp_path / "mixed" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()


def nlp_model_inverse(model: Model) -> Model:
    """The model itself: what is fused keeps its names."""
    return model


def test_a_split_lead_takes_fused_weights_apart_as_the_model_reads_them(merge: Run, tmp_path: Path) -> None:
    model = hf_model(1)
    one = save(tmp_path / "hf", model, "qwen2")
    other = save(tmp_path / "fused", fused(model), "qwen2")
    merge("--model_path_list", one, other, "--output_path", tmp_path / "C")
    assert same(values(tmp_path / "C"), model)
    merge("--model_path_list", other, one, "--output_path", tmp_path / "D")
    assert same(values(tmp_path / "D"), fused(model))
    assert json.loads((tmp_path / "D" / "config.json").read_text())["source"] == "paddle"


def test_what_is_turned_is_told(modelfuse: Run, merge: Run, tmp_path: Path) -> None:
    hf, paddle = save(tmp_path / "hf", hf_model(1)), save(tmp_path / "paddle", transposed(hf_model(2)))
    said = modelfuse("check", "--model_path_list", hf, paddle)
    assert said.status == 0
    assert f"{paddle} is in Paddle's layout, [in, out]" in said.out
    assert f"{hf} is in" not in said.out
    said = merge("--model_path_list", hf, paddle, "--output_path", tmp_path / "C", "--output_format", "paddle")
    assert f"{hf} is in Hugging Face's layout" in said.err
    assert 'load_checkpoint_format=""' in said.out
    report = json.loads((tmp_path / "C" / "merge_report.json").read_text())
    assert [each["layout"] for each in report["inputs"]] == ["hf", "paddle"]


def test_the_flags_of_paddles_tool(merge: Run, refuse: Refuse, tmp_path: Path) -> None:
    model = hf_model(1)
    hf, paddle = save(tmp_path / "hf", model), save(tmp_path / "paddle", transposed(model))
    both = ("--model_path_list", hf, hf, "--output_path", tmp_path / "C", "--overwrite")
    merge(*both, "--save_to_hf", "False")
    assert same(values(tmp_path / "C"), transposed(model))
    merge(*both, "--convert_from_hf", "--no_save_to_hf")
    assert same(values(tmp_path / "C"), transposed(model))
    merge("--model_path_list", paddle, hf, *both[3:], "--save_to_hf")
    assert same(values(tmp_path / "C"), model)
    merge("--model_path_list", paddle, paddle, *both[3:], "--convert_from_hf", "False")
    assert same(values(tmp_path / "C"), transposed(model))
    refuse("check", *both, "--no_convert_from_hf", says=[hf, "cannot be in Paddle's"], hint="convert_from_hf")
    refuse("check", *both, "--no_save_to_hf", "--output_format", "hf", says=["save_to_hf", "output_format"])
    refuse("check", *both, "--save_to_hf", "--output_format", "pdparams", says=["save_to_hf", "output_format"])
    refuse("check", *both, "--convert_from_hf", "--input_layout", "paddle", says=["convert_from_hf", "input_layout"])
    refuse("check", *both, "--input_layout", "hf", "hf", "hf", says=["3 values for 2 inputs"], hint="base last")


def squares(seed: int) -> Model:
    """A model whose Linear weights are all square."""
    draw = np.random.default_rng(seed)
    names = [f"model.layers.0.mlp.{each}_proj.weight" for each in ("gate", "up", "down")]
    square = {name: draw.standard_normal((HIDDEN, HIDDEN)).astype(np.float32) for name in names}
    return {"model.embed_tokens.weight": hf_model(seed)["model.embed_tokens.weight"], **square}


def test_square_weights_are_never_guessed(merge: Run, refuse: Refuse, tmp_path: Path) -> None:
    one, two = squares(1), squares(2)
    plain = [save(tmp_path / "one", one), save(tmp_path / "two", two)]
    paddle = save(tmp_path / "paddle", transposed(two), source="paddle")
    out = ("--output_path", tmp_path / "C", "--overwrite")
    merge("--model_path_list", *plain, *out)
    expected = values(tmp_path / "C")
    for order in ((plain[0], paddle), (paddle, plain[0])):
        refuse("merge", "--model_path_list", *order, *out, says=[plain[0], "square"], hint="--input_layout")
    refuse("merge", "--model_path_list", *plain, *out, "--save_to_hf", "False", says=[plain[0]], hint="--input_layout")
    merge("--model_path_list", plain[0], paddle, *out, "--input_layout", "hf", "paddle")
    assert same(values(tmp_path / "C"), expected)
    models = ("--model_path_list", plain[0], plain[0], "--base_model_path")
    merge(*models, plain[1], *out)
    based = values(tmp_path / "C")
    merge(*models, paddle, *out, "--input_layout", "hf", "hf", "paddle", "--save_to_hf")
    assert same(values(tmp_path / "C"), based)
    merge("--model_path_list", *plain, *out, "--input_layout", "hf", "--output_format", "paddle")
    assert same(values(tmp_path / "C"), transposed(expected))


def test_files_of_torch_hold_hugging_faces_layout(merge: Run, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    one, two = squares(1), squares(2)
    hf = save(tmp_path / "hf", {"other": np.zeros(1)})
    (hf / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(each) for name, each in one.items()}, hf / "pytorch_model.bin")
    paddle = save_pdparams(tmp_path / "paddle", transposed(two))
    merge("--model_path_list", hf, paddle, "--output_path", tmp_path / "C")
    merge("--model_path_list", save(tmp_path / "1", one), save(tmp_path / "2", two), "--output_path", tmp_path / "D")
    assert same(values(tmp_path / "C"), values(tmp_path / "D"))


def test_signs_that_contradict_each_other(merge: Run, refuse: Refuse, tmp_path: Path) -> None:
    model = hf_model(1)
    good = save(tmp_path / "good", model)
    signed = save(tmp_path / "signed", model, source="paddle")
    check = ("check", "--model_path_list", good)
    refuse(*check, signed, says=[signed, "source: paddle", "[out, in]"], hint="--input_layout")
    pickled = save_pdparams(tmp_path / "pickled", model)
    refuse(*check, pickled, says=[pickled, ".pdparams", "[out, in]"], hint="--input_layout")
    merge("--model_path_list", good, signed, "--input_layout", "hf", "--output_path", tmp_path / "C")
    assert same(values(tmp_path / "C"), model)
    half = {name: each.T.copy() if "qkv" in name or "gate" in name else each for name, each in fused(model).items()}
    both = save(tmp_path / "both", half, "qwen2")
    for declared in ((), ("--input_layout", "paddle")):
        refuse("check", "--model_path_list", both, both, *declared, says=[both, "both layouts"], hint="Save it again")


def test_an_unknown_architecture_may_have_weights_both_ways(merge: Run, refuse: Refuse, tmp_path: Path) -> None:
    """What its names mean is its own affair, once the user has said that nothing is to be turned."""
    model = {name: each.T.copy() if "down" in name else each for name, each in hf_model(1).items()}
    strange = save(tmp_path / "strange", model, "strange")
    refuse("check", "--model_path_list", strange, strange, says=[strange, "both layouts"], hint="--input_layout hf")
    merge("--model_path_list", strange, strange, "--input_layout", "hf", "--output_path", tmp_path / "C")
    assert same(values(tmp_path / "C"), model)


def test_metadata_proves_nothing(merge: Run, tmp_path: Path) -> None:
    """PaddleFormers has long written ``format: np`` beside Hugging Face's layout."""
    config = {"model_type": "llama", **CONFIG}
    model = hf_model(1)
    one = make_model(tmp_path / "A", model, config=config, metadata={"format": "np"})
    merge("--model_path_list", one, one, "--output_path", tmp_path / "C")
    assert same(values(tmp_path / "C"), model)
    assert read_file(tmp_path / "C" / "model.safetensors")[1] == {"format": "pt"}


def test_a_model_without_config_is_told_from_its_embedding(merge: Run, tmp_path: Path) -> None:
    model = hf_model(1)
    hf = save(tmp_path / "hf", model)
    bare = make_model(tmp_path / "bare", transposed(model), config=None)
    merge("--model_path_list", hf, bare, "--output_path", tmp_path / "C")
    assert same(values(tmp_path / "C"), model)


def test_tied_heads_of_paddlenlp(merge: Run, tmp_path: Path) -> None:
    """Two names of one array, as paddle.save keeps it; Hugging Face's file has one of them, or both."""
    models = [hf_model(seed) | {"lm_head.weight": hf_model(seed)["model.embed_tokens.weight"]} for seed in range(2)]
    tied: dict[str, Any] = {"tie_word_embeddings": True}
    nlp = nlp_model(models[0])
    nlp["lm_head.weight"] = nlp["llama.embed_tokens.weight"]
    one, two = save_pdparams(tmp_path / "nlp", nlp, **tied), save(tmp_path / "hf", models[1], **tied)
    merge("--model_path_list", one, two, "--output_path", tmp_path / "C")
    merge("--model_path_list", one, two, "--output_path", tmp_path / "D", "--save_to_hf")
    three = save(tmp_path / "three", models[0], **tied)
    merge("--model_path_list", three, two, "--output_path", tmp_path / "E")
    assert same(values(tmp_path / "D"), values(tmp_path / "E"))
    expected = nlp_model(values(tmp_path / "E") | {"lm_head.weight": np.zeros((1, 1))})
    assert same(values(tmp_path / "C"), {name: each for name, each in expected.items() if name != "lm_head.weight"})


def test_an_encoder_of_another_width_does_not_count(merge: Run, tmp_path: Path) -> None:
    """Its weights may look transposed for the decoder's width."""
    model = {name.replace("model.", "model.language_model.", 1): each for name, each in hf_model(1).items()}
    model["model.visual.layers.0.mlp.up_proj.weight"] = np.ones((HIDDEN, 3), np.float32)
    one = save(tmp_path / "A", model, "seeing")
    merge("--model_path_list", one, one, "--output_path", tmp_path / "C")
    assert same(values(tmp_path / "C"), model)


def test_an_unknown_architecture_works_where_its_names_agree(merge: Run, refuse: Refuse, tmp_path: Path) -> None:
    """Weights that no table knows are turned if they have the other model's shape turned; square ones are refused."""
    draw = np.random.default_rng(0)
    shapes = {"encoder.mix.weight": (6, 5), "encoder.table": (5, 6), "encoder.conv.weight": (2, 3, 4), "norm": (6,)}
    model = hf_model(1) | {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    other = transposed(model) | {"encoder.mix.weight": model["encoder.mix.weight"].T.copy()}
    one, two = save(tmp_path / "hf", model, "novel"), save(tmp_path / "paddle", other, "novel")
    merge("--model_path_list", one, two, "--output_path", tmp_path / "C")
    assert same(values(tmp_path / "C"), model)
    refuse("check", "--model_path_list", one, one, "--output_format", "paddle", says=["novel", "q_proj"], hint="llama")
    square = {"encoder.square.weight": np.eye(4, dtype=np.float32)}
    one, two = save(tmp_path / "h2", model | square, "novel"), save(tmp_path / "p2", other | square, "novel")
    refuse("check", "--model_path_list", one, two, says=[two, "encoder.square.weight"], hint="one layout")
    one = save(tmp_path / "h3", {name: each for name, each in model.items() if "encoder" not in name} | square)
    refuse("check", "--model_path_list", one, one, "--output_format", "pdparams", says=["encoder.square.weight"])


def test_fused_weights_that_cannot_be_cut(refuse: Refuse, tmp_path: Path) -> None:
    model = hf_model(1)
    hf, whole = save(tmp_path / "hf", model, "qwen2"), fused(model)
    other = save(tmp_path / "fused", whole, "qwen2")
    for setting, value in (("num_key_value_heads", 3), ("num_attention_heads", None)):
        for folder in (hf, other):
            config = json.loads((folder / "config.json").read_text()) | {setting: value}
            (folder / "config.json").write_text(json.dumps(config))
        refuse("check", "--model_path_list", hf, other, says=[other, "num_key_value_heads"])
        for folder in (hf, other):
            (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **CONFIG}))
    short = {name: each[..., :-1] if "qkv" in name else each for name, each in whole.items()}
    refuse("check", "--model_path_list", hf, save(tmp_path / "short", short, "qwen2"), says=["23 outputs", "q_proj"])
    lonely = {name: each for name, each in model.items() if ".layers.1.self_attn.v_proj" not in name}
    refuse("check", "--model_path_list", other, save(tmp_path / "lonely", lonely, "qwen2"), says=["layers.1", "lonely"])


def test_sharded_pdparams_and_their_faults(merge: Run, modelfuse: Run, tmp_path: Path) -> None:
    one, two = (save(tmp_path / f"{seed}", hf_model(seed), "qwen2") for seed in (1, 2))
    out = tmp_path / "C"
    options = ("--output_format", "pdparams", "--max_shard_size", "900B")
    merge("--model_path_list", one, two, "--output_path", out, *options)
    names = sorted(path.name for path in out.glob("*.pdparams"))
    assert names[0] == f"model_state-00001-of-{len(names):05d}.pdparams"
    assert len(names) > 3
    index = json.loads((out / "model_state.pdparams.index.json").read_text())
    assert set(index["weight_map"].values()) == set(names)
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in read_pdparams(out).values())
    assert len(open_checkpoint(out)) == len(index["weight_map"])
    assert modelfuse("verify", out, "--full").status == 0
    path = out / names[1]
    content = path.read_bytes()
    for at in (2, len(content) // 2, len(content) - 2):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        said = modelfuse("verify", out)
        assert said.status == 2
        assert names[1] in said.err
    path.write_bytes(content)
    (out / "model.safetensors").write_bytes(b"")
    assert "model.safetensors is not one of the merge's files" in modelfuse("verify", out).err


def test_workers_change_nothing(merge: Run, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    config = {**CONFIG, "hidden_size": 500, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 20}
    shapes = {"q": (800, 500), "k": (160, 500), "v": (160, 500)}
    names = {f"model.layers.0.self_attn.{each}_proj.weight": shape for each, shape in shapes.items()}
    names |= {f"model.layers.0.mlp.{each}_proj.weight": (1111, 500) for each in ("gate", "up")}
    models = [{name: bf16(draw.standard_normal(shape)) for name, shape in names.items()} for _ in range(2)]
    folders = [save(tmp_path / f"{number}", each, "qwen2", **config) for number, each in enumerate(models)]
    found = []
    for workers, memory in ((1, "1GB"), (3, "1B")):
        out = tmp_path / f"out{workers}"
        merge("--model_path_list", *folders, "--merge_method", "slerp", "--n_process", workers, "--memory", memory,
              "--output_format", "pdparams", "--output_path", out)  # fmt: skip
        found.append(snapshot(out)["model_state.pdparams"])
    assert found[0] == found[1]
    merge("--model_path_list", out, out, "--save_to_hf", "--output_path", tmp_path / "back")
    merge("--model_path_list", out, folders[0], "--weight_list", 1, 0, "--save_to_hf", "--output_path", tmp_path / "hf")
    back, hf = read_model(tmp_path / "back"), read_model(tmp_path / "hf")
    assert {name: back[name].data for name in hf} == {name: each.data for name, each in hf.items()}


def test_types_that_pdparams_do_not_have(refuse: Refuse, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="uint32"):
        frame_paddle([("a", BY_NAME["U32"], (2,))])
    one = save(tmp_path / "A", {**hf_model(1), "model.ids": np.ones(3, np.uint64)})
    refuse("check", "--model_path_list", one, one, "--output_format", "pdparams", says=["model.ids", "uint64"])


def test_the_pickle_is_one_for_any_reader() -> None:
    """Disassembled by Python's own tool, which checks the stack; with sizes and names of every length."""
    import pickletools

    tensors = [("a", BY_NAME["F32"], (2, 3)), ("ü" * 300, BY_NAME["BF16"], ()), ("c", BY_NAME["I8"], (0, 2**40))]
    frame = frame_paddle(tensors)
    data = bytearray(frame.size)
    for offset, piece in frame.pieces:
        data[offset : offset + len(piece)] = piece
    data[frame.offsets[0] : frame.offsets[0] + 24] = np.arange(6, dtype="<f4").tobytes()
    assert [name for name, _, _ in pickletools.genops(bytes(data)) if name.name == "BINBYTES8"]
    loaded = pickle.loads(bytes(data))
    assert list(loaded) == [name for name, _, _ in tensors]
    assert np.array_equal(loaded["a"], np.arange(6).reshape(2, 3))
    assert [each.shape for each in loaded.values()] == [shape for _, _, shape in tensors]
    assert [each.dtype.str for each in loaded.values()] == ["<f4", "<u2", "|i1"]
