"""Every architecture that PaddleFormers states layouts of, against files that it wrote and against its statements."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Said, make_model, read_model
from test_layouts import FIXTURES, fixture, paddleformers, same, save_pdparams, values

from modelfuse.checkpoints.layouts import paddleformers as tables
from modelfuse.checkpoints.layouts.tables import FUSED

Run = Callable[..., Said]
Refuse = Callable[..., str]
Model = dict[str, np.ndarray]

ROOT = Path(__file__).parent.parent
KINDS = sorted(set(tables.ARCHITECTURES) - {"llama", "qwen2", "qwen3", "mistral"})
#: Weights that PaddleFormers rounds to bfloat16 when it saves them for Hugging Face.
ROUNDED = ("gate.weight", "shared_expert_gate.weight")
#: PaddleFormers 1.2 misnames these in what it saves for Hugging Face.
MISNAMED = re.compile(r"^model\.language_model\.(layers\.\d+\.self_attn\.[qkv]_proj\.bias)$")


def folders(kind: str, folder: Path) -> tuple[Path, Path]:
    """PaddleFormers' two files of one model; that for Hugging Face with the values and names that it should have."""
    paddle, hf = fixture(kind, folder)
    found, exact = values(hf), unpickled(paddle)
    for name in found:
        if name.endswith(ROUNDED):
            true = exact[name] if kind == "glm4_moe" else exact[name].T
            np.testing.assert_allclose(true, found[name].astype(np.float32), rtol=2**-8)
            found[name] = true
    if kind == "qwen2_5_vl":
        found = {MISNAMED.sub(r"model.\1", name): each for name, each in found.items()}
    config = json.loads((hf / "config.json").read_text())
    return paddle, make_model(folder / "true", {name: each.copy() for name, each in found.items()}, config=config)


def unpickled(folder: Path) -> Model:
    with open(folder / "model_state.pdparams", "rb") as file:
        found: Model = pickle.load(file)
    found.pop("StructuredToParameterName@@", None)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_give_what_paddleformers_itself_saves(merge: Run, tmp_path: Path, kind: str) -> None:
    paddle, hf = folders(kind, tmp_path)
    merge("--model_path_list", paddle, paddle, "--output_path", tmp_path / "C", "--output_format", "hf")
    made = values(tmp_path / "C")
    tied = {"lm_head.weight"} if kind == "gemma3_text" else set()
    assert same({name: each for name, each in made.items() if name not in tied}, values(hf))
    merge("--model_path_list", hf, hf, "--output_path", tmp_path / "D", "--output_format", "paddle")
    assert same(values(tmp_path / "D"), {name: each for name, each in unpickled(paddle).items() if name not in tied})


@pytest.mark.parametrize("kind", ["ernie4_5_moe", "qwen2_5_vl", "qwen3_vl_moe", "glm4_moe", "gpt_oss", "phi3"])
def test_merging_both_kinds_is_merging_in_one(merge: Run, tmp_path: Path, kind: str) -> None:
    """Both files are of one model, so that the ties of differences from another do not depend on which is which."""
    paddle, hf = folders(kind, tmp_path)
    config = json.loads((hf / "config.json").read_text())
    draw = np.random.default_rng(0)
    base = {name: each + draw.standard_normal(each.shape).astype(np.float32) for name, each in values(hf).items()}
    base_folder = make_model(tmp_path / "base", base, config=config)
    options = ("--merge_method", "ties", "--base_model_path", base_folder, "--weight_list", 0.7, 0.3)
    for name, models in (("mixed", (paddle, hf)), ("plain", (hf, hf))):
        merge("--model_path_list", *models, *options, "--output_path", tmp_path / name)
    mixed, plain = (tmp_path / name / "model.safetensors" for name in ("mixed", "plain"))
    assert mixed.read_bytes() == plain.read_bytes()


@pytest.mark.parametrize("kind", ["ernie4_5", "qwen2_moe", "qwen3_moe", "glm4_moe", "phi3", "qwen2_5_vl", "qwen3_vl"])
def test_transformers_gives_paddleformers_logits(merge: Run, tmp_path: Path, kind: str) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    paddle, _ = folders(kind, tmp_path)
    merge("--model_path_list", paddle, paddle, "--output_path", tmp_path / "C", "--output_format", "hf")
    auto = transformers.AutoModelForImageTextToText if "vl" in kind else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(
        tmp_path / "C", dtype=torch.float32, **({"experts_implementation": "eager"} if "moe" in kind else {})
    )
    with torch.no_grad():
        logits = model.eval()(torch.arange(3, 15)[None]).logits.numpy()  # type: ignore[no-untyped-call]
    np.testing.assert_allclose(logits, np.load(FIXTURES / kind / "logits.npy"), atol=2e-5, rtol=1e-5)


def stated(statements: list[str], model: Model, experts: int = 2) -> Model:
    """What PaddleFormers' statements make of a model in Hugging Face's layout."""
    made: Model = {}
    for line in _each(statements, experts):
        left, right = line.split("->")
        sources = [each.strip() for each in left.split(",")]
        target, *words = (each.strip() for each in right.split(","))
        if any(each.removesuffix("^T") not in model for each in sources):
            continue
        parts = [model[each.removesuffix("^T")] for each in sources]
        parts = [part.T if each.endswith("^T") else part for each, part in zip(sources, parts, strict=True)]
        made[target] = np.ascontiguousarray(_joined(parts, words))
    biases = {name: each for name, each in model.items() if name.endswith("o_proj.bias")}  # Nothing is said of them.
    return made | biases


def _joined(parts: list[np.ndarray], words: list[str]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    groups = 1
    if "fused_qkv" in words:
        groups = next(int(each.split("=")[1]) for each in words if each.startswith("num_key_value_groups"))
    cut = [np.split(part, groups, axis=-1) for part in parts]
    return np.concatenate([part[group] for group in range(groups) for part in cut], axis=-1)


def _each(statements: list[str], experts: int) -> Iterator[str]:
    for line in statements:
        for layer in range(2) if "$LAYER_ID" in line else [0]:
            for expert in range(experts) if "$EXPERT_ID" in line else [0]:
                yield line.replace("$LAYER_ID", str(layer)).replace("$EXPERT_ID", str(expert))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "glm4_moe"])
def test_models_of_paddlefleet(merge: Run, tmp_path: Path, kind: str) -> None:
    """They run on GPUs only; what is stated of them is evaluated here, on what PaddleFormers saved of the others."""
    statements = json.loads((FIXTURES / "fleet.json").read_text())[kind]
    paddle, hf = fixture(kind, tmp_path) if kind in ("qwen2", "qwen3") else folders(kind, tmp_path)
    model = values(hf)
    config = json.loads((paddle / "config.json").read_text())
    fleet = stated(statements, model)
    assert "model.embedding.embed_tokens.weight" in fleet
    other = save_pdparams(tmp_path / "fleet", fleet, kind, **config)
    merge("--model_path_list", other, hf, "--output_path", tmp_path / "C", "--output_format", "hf")
    assert same(values(tmp_path / "C"), model)
    merge("--model_path_list", hf, paddle, other, "--base_model_path", other, "--output_path", tmp_path / "D",
          "--weight_list", 0.5, 0.25, 0.25)  # fmt: skip
    assert same(values(tmp_path / "D"), fleet)


def test_prediction_layers_of_glm(merge: Run, tmp_path: Path) -> None:
    """A layer past the last is called otherwise in Paddle, and is no part of what runs."""
    _, hf = folders("glm4_moe", tmp_path)
    model = values(hf)
    last = {name.replace("layers.1.", "layers.2."): each for name, each in model.items() if ".layers.1." in name}
    eh = np.arange(128, dtype=np.float32).reshape(8, 16)
    more = {"model.layers.2.eh_proj.weight": eh, "model.layers.2.shared_head.norm.weight": np.ones(8, np.float32)}
    config = json.loads((hf / "config.json").read_text())
    whole = make_model(tmp_path / "whole", model | last | more, config=config)
    merge("--model_path_list", whole, whole, "--output_path", tmp_path / "C", "--output_format", "paddle")
    made = values(tmp_path / "C")
    assert np.array_equal(made["model.layers.2.eh_proj.weight"], eh.T)
    assert "model.layers.2.norm.weight" in made
    first = "mlp.experts.0.up_gate_proj.weight"
    assert np.array_equal(made[f"model.layers.2.transformer_layer.{first}"], made[f"model.layers.1.{first}"])
    merge("--model_path_list", *[tmp_path / "C"] * 2, "--output_path", tmp_path / "D", "--output_format", "hf")
    assert same(values(tmp_path / "D"), model | last | more)


def test_square_weights_of_experts_are_never_guessed(merge: Run, refuse: Refuse, tmp_path: Path) -> None:
    names = [f"model.layers.0.mlp.experts.{each}.{part}_proj.weight" for each in "01" for part in ("gate", "down")]
    draw = np.random.default_rng(0)
    square = {name: draw.standard_normal((8, 8)).astype(np.float32) for name in names}
    square["model.layers.0.mlp.gate.weight"] = draw.standard_normal((8, 8)).astype(np.float32)
    config: dict[str, Any] = {"model_type": "deepseek_v3", "hidden_size": 8}
    plain = make_model(tmp_path / "plain", square, config=config)
    turned = {name: each.T.copy() for name, each in square.items()}
    paddle = make_model(tmp_path / "paddle", turned, config=config | {"source": "paddle"})
    options = ("--model_path_list", plain, paddle, "--output_path", tmp_path / "C")
    refuse("merge", *options, says=[plain, "square"], hint="--input_layout")
    merge(*options, "--input_layout", "hf", "paddle")
    assert same(values(tmp_path / "C"), square)


def test_what_is_not_stated_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    paddle, hf = folders("qwen3_moe", tmp_path)
    model = values(hf) | {"model.layers.0.mlp.extra.weight": np.ones((3, 4), np.float32)}
    strange = make_model(tmp_path / "strange", model, config=json.loads((hf / "config.json").read_text()))
    refuse("check", "--model_path_list", strange, paddle, "--output_format", "paddle", says=[strange, "mlp.extra"])


def test_how_parts_are_fused_is_as_stated() -> None:
    for kind in tables.ARCHITECTURES:
        for layout in (tables.PLAIN, tables.FLEET):
            found = tables.stated(kind, None, layout)
            for name in found.fused if found is not None else ():
                assert name in FUSED
    by_head = [kind for kind in tables.ARCHITECTURES if tables.fuses_by_head(kind)]
    assert "glm4_moe" in by_head
    assert not {"phi3", "llama", "mistral", "gpt_oss", "deepseek_v3"} & {*by_head}


@pytest.mark.skipif(
    paddleformers() is None, reason="name a Python with PaddleFormers in MODELFUSE_PADDLEFORMERS_PYTHON"
)
def test_the_table_is_what_paddleformers_states(tmp_path: Path) -> None:
    tool = ROOT / "tools" / "paddleformers_layouts.py"
    subprocess.run([str(paddleformers()), str(tool), str(tmp_path / "table.json")], check=True, capture_output=True)
    table = ROOT / "modelfuse" / "checkpoints" / "layouts" / "paddleformers.json"
    assert (tmp_path / "table.json").read_text() == table.read_text()


@pytest.mark.skipif(
    paddleformers() is None, reason="name a Python with PaddleFormers in MODELFUSE_PADDLEFORMERS_PYTHON"
)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if (FIXTURES / kind / "logits.npy").exists()])
def test_paddleformers_loads_what_comes_out(merge: Run, tmp_path: Path, kind: str) -> None:
    _, hf = folders(kind, tmp_path)
    merge("--model_path_list", hf, hf, "--output_path", tmp_path / "C", "--output_format", "pdparams")
    assert read_model(hf)
    command = [paddleformers(), FIXTURES / "paddleformers_models.py", "logits", tmp_path / "C", tmp_path / "logits.npy"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(
        np.load(tmp_path / "logits.npy"), np.load(FIXTURES / kind / "logits.npy"), atol=1e-6, rtol=1e-6
    )
