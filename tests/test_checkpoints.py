"""Models of any format merge with one another, and transformers loads what comes out."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Said, Stored, array, bf16, make_model, random_tensors, read_file, read_model

import modelfuse as package
from modelfuse.checkpoints import open_checkpoint

Run = Callable[..., Said]
Refuse = Callable[..., str]
FIXTURES = Path(__file__).parent / "fixtures"
NO_TORCH = "needs torch to write its own format; modelfuse reads it without"
NO_TRANSFORMERS = "needs transformers, to load what was merged"


def make_bin(folder: Path, tensors: dict[str, np.ndarray], *, shards: int = 1, bfloat16: bool = False) -> Path:
    """A pytorch_model.bin, or shards of it with their index."""
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    folder.mkdir(parents=True)
    state = {name: torch.from_numpy(each.copy()) for name, each in tensors.items()}
    state = {name: each.bfloat16() if bfloat16 and each.is_floating_point() else each for name, each in state.items()}
    names = [f"pytorch_model-{number:05d}-of-{shards:05d}.bin" for number in range(1, shards + 1)]
    names = names if shards > 1 else ["pytorch_model.bin"]
    for number, name in enumerate(names):
        torch.save({each: state[each] for each in list(state)[number::shards]}, folder / name)
    if shards > 1:
        weight_map = {each: names[number % shards] for number, each in enumerate(state)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return folder


def make_paddle(folder: Path, tensors: dict[str, np.ndarray], *, name: str = "model_state.pdparams") -> Path:
    """A file as paddle.save writes it: numpy arrays, and the table of Paddle's own names."""
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, object] = {each: (f"linear_{each}.w_0", value) for each, value in tensors.items()}
    state["StructuredToParameterName@@"] = {each: f"linear_{each}.w_0" for each in tensors}
    (folder / name).write_bytes(pickle.dumps(state, protocol=4))
    (folder / "config.json").write_text("{}")
    return folder


MAKERS: dict[str, Callable[[Path, dict[str, np.ndarray]], Path]] = {
    "safetensors": make_model,
    "shards": lambda folder, tensors: make_model(folder, tensors, shards=3),
    "shards without index": lambda folder, tensors: make_model(folder, tensors, shards=2, index=False),
    "bin": make_bin,
    "bin shards": lambda folder, tensors: make_bin(folder, tensors, shards=2),
    "pdparams": make_paddle,
}


@pytest.mark.parametrize("second", MAKERS)
@pytest.mark.parametrize("first", MAKERS)
def test_formats_in_any_mix(merge: Run, tmp_path: Path, first: str, second: str) -> None:
    values = [random_tensors(seed) for seed in range(3)]
    for each in values:
        each["ids"] = np.arange(5)
    models = [MAKERS[first](tmp_path / "A", values[0]), MAKERS[second](tmp_path / "B", values[1])]
    base = MAKERS[first](tmp_path / "base", values[2])
    merge("--model_path_list", *models, "--output_path", tmp_path / "C")
    merged = read_model(tmp_path / "C")
    assert set(merged) == set(values[0])
    for name, stored in merged.items():
        expected = values[0][name] if name == "ids" else (values[0][name] + values[1][name]) / 2
        np.testing.assert_allclose(array(stored), expected, rtol=1e-6)
        assert array(stored).dtype == values[0][name].dtype
    merge(
        "--model_path_list",
        *models,
        "--base_model_path",
        base,
        "--output_path",
        tmp_path / "D",
        "--merge_method",
        "ties",
    )
    plain = [make_model(tmp_path / f"plain{seed}", each) for seed, each in enumerate(values)]
    merge(
        "--model_path_list",
        *plain[:2],
        "--base_model_path",
        plain[2],
        "--output_path",
        tmp_path / "E",
        "--merge_method",
        "ties",
    )
    assert read_model(tmp_path / "D") == read_model(tmp_path / "E")


def test_a_weight_file_instead_of_a_folder(merge: Run, tmp_path: Path) -> None:
    values = [random_tensors(seed) for seed in range(3)]
    a = make_model(tmp_path / "A", values[0]) / "model.safetensors"
    b = make_paddle(tmp_path / "B", values[1]) / "model_state.pdparams"
    c = make_model(tmp_path / "c", values[2]) / "model.safetensors"
    c = c.rename(tmp_path / "own name.safetensors")
    merge("--model_path_list", a, b, c, "--output_path", tmp_path / "M")
    expected = sum(each["lm_head.weight"] for each in values) / 3
    np.testing.assert_allclose(array(read_model(tmp_path / "M")["lm_head.weight"]), expected, rtol=1e-5)
    assert (tmp_path / "M" / "config.json").exists()


def test_safetensors_come_before_other_formats(merge: Run, tmp_path: Path) -> None:
    """Repositories often hold the same model twice."""
    a = make_model(make_paddle(tmp_path / "A", {"other": np.ones(2, np.float32)}), random_tensors(1))
    b = make_model(tmp_path / "B", random_tensors(2))
    merge("--model_path_list", a, b, "--output_path", tmp_path / "C")
    assert set(read_model(tmp_path / "C")) == set(random_tensors(1))
    assert not (tmp_path / "C" / "model_state.pdparams").exists()


def test_master_weights_of_every_format(merge: Run, tmp_path: Path) -> None:
    values = [{"w": np.full(3, number, np.float32)} for number in range(3)]
    a = make_model(tmp_path / "A", values[0], prefix="master_weights", shards=1)
    b = make_paddle(tmp_path / "B", values[1], name="master_weights.pdparams")
    words = ["--merge_prefix", "master_weights", "--output_path", tmp_path / "M"]
    merge("--model_path_list", a, b, *words)
    assert array(read_model(tmp_path / "M", "master_weights")["w"]).tolist() == [0.5] * 3


# bfloat16 in its disguises


@pytest.mark.parametrize(
    ("metadata", "config", "hidden"),
    [({"format": "np"}, {}, True), ({"format": "pd"}, {}, True), ({"format": "paddle"}, {}, True),
     ({"format": "pt"}, {"torch_dtype": "bfloat16"}, True), ({}, {"dtype": "bfloat16"}, True),
     ({"format": "pt"}, {}, False), ({}, {"dtype": "float32"}, False)],
)  # fmt: skip
def test_uint16_that_is_bfloat16(
    merge: Run, tmp_path: Path, metadata: dict[str, str], config: dict[str, str], hidden: bool
) -> None:
    models = []
    for number, name in enumerate("AB"):
        half = np.frombuffer(bf16([1 + number if hidden else 1, 2.5]).data, np.uint16)
        models.append(make_model(tmp_path / name, {"w": half}, metadata=metadata, config=config))
    merge("--model_path_list", *models, "--output_path", tmp_path / "C")
    merged = read_model(tmp_path / "C")["w"]
    assert merged.dtype == ("BF16" if hidden else "U16")
    if hidden:
        assert array(merged).tolist() == [1.5, 2.5]


def test_our_own_output_merges_again(merge: Run, tmp_path: Path) -> None:
    """Also where the inputs hid bfloat16 and the metadata says so for ever."""
    models = [
        make_model(tmp_path / name, {"w": np.frombuffer(bf16([number, 1]).data, np.uint16)}, metadata={"format": "np"})
        for number, name in enumerate("AB")
    ]
    merge("--model_path_list", *models, "--output_path", tmp_path / "C")
    merge("--model_path_list", tmp_path / "C", models[0], "--output_path", tmp_path / "D")
    assert array(read_model(tmp_path / "D")["w"]).tolist() == [0.25, 1]


def test_paddle_bfloat16_beside_torch_bfloat16(merge: Run, tmp_path: Path) -> None:
    values = {"w": np.array([1, 2, 3], np.float32)}
    a = make_paddle(tmp_path / "A", {"w": np.frombuffer(bf16(values["w"]).data, np.uint16)})
    b = make_model(tmp_path / "B", {"w": bf16(values["w"] * 3)})
    merge("--model_path_list", a, b, "--output_path", tmp_path / "C")
    merged = read_model(tmp_path / "C")["w"]
    assert (merged.dtype, array(merged).tolist()) == ("BF16", [2, 4, 6])


# Tied weights and transformers


def test_storage_shared_in_a_bin_file(merge: Run, tmp_path: Path) -> None:
    """The frozen file holds lm_head.weight and model.embed.weight as one storage."""
    models = []
    for name in "AB":
        (tmp_path / name).mkdir()
        shutil.copy(FIXTURES / "torch" / "zip.bin", tmp_path / name / "pytorch_model.bin")
        models.append(tmp_path / name)
    merge("--model_path_list", *models, "--output_path", tmp_path / "C")
    merged, _ = read_file(tmp_path / "C" / "model.safetensors")
    assert set(merged) == {"model.embed.weight", "model.up.weight", "model.norm.weight"}
    report = json.loads((tmp_path / "C" / "merge_report.json").read_text())
    assert report["left_out"] == [{"tensor": "lm_head.weight", "because": "tied to model.embed.weight"}]
    assert [entry["tensors"] for entry in report["inputs"]] == [4, 4]


def test_shared_storage_beside_two_tensors(merge: Run, tmp_path: Path) -> None:
    """Shared in one model, apart in the other: both names are merged."""
    (tmp_path / "A").mkdir()
    shutil.copy(FIXTURES / "torch" / "zip.bin", tmp_path / "A" / "pytorch_model.bin")
    shared = open_checkpoint(tmp_path / "A")
    random = np.random.default_rng(0)
    names = [*shared, *shared.aliases]
    shapes = {name: shared[shared.aliases.get(name, name)].shape for name in names}
    make_model(tmp_path / "B", {name: random.standard_normal(shapes[name]).astype(np.float32) for name in names})
    merge("--model_path_list", tmp_path / "B", tmp_path / "A", "--output_path", tmp_path / "C")
    merged = read_model(tmp_path / "C")
    assert set(merged) == set(names)
    assert merged["lm_head.weight"].data != merged["model.embed.weight"].data


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("torch", reason=NO_TRANSFORMERS)
    return pytest.importorskip("transformers", reason=NO_TRANSFORMERS)


def make_llama(transformers: Any, seed: int, *, tied: bool, kind: str = "Llama", dtype: str = "float32") -> Any:
    import torch

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    if kind == "GPT2":
        config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    else:
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, tie_word_embeddings=tied)
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else "LlamaForCausalLM")(config)
    return model.to(getattr(torch, dtype)).eval()


def load(transformers: Any, folder: Path) -> Any:
    """Load with transformers; it must find every key it wants and none that it does not know."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info.get(kind), (kind, info[kind])
    return model.eval()


def expect_average(transformers: Any, folder: Path, models: list[Any]) -> None:
    """The merge is the average of the models, parameter by parameter, as transformers sees it."""
    import torch

    merged = load(transformers, folder).state_dict()
    states = [model.state_dict() for model in models]
    assert set(merged) == set(states[0])
    for name, value in merged.items():
        expected = sum(state[name].double() for state in states) / len(states)
        torch.testing.assert_close(
            value.double(), expected, rtol=1e-2 if value.dtype != torch.float32 else 1e-6, atol=1e-6
        )


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_transformers_loads_a_merge(transformers: Any, tmp_path: Path, tied: bool, kind: str) -> None:
    models = [make_llama(transformers, seed, tied=tied, kind=kind) for seed in range(2)]
    for name, model, size in zip("AB", models, ("5GB", "6KB"), strict=True):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
    for name, most in (("C", 10**9), ("D", 5000)):
        package.merge(
            model_path_list=[tmp_path / "A", tmp_path / "B"], output_path=tmp_path / name, max_shard_size=most
        )
        expect_average(transformers, tmp_path / name, models)
    assert (tmp_path / "D" / "model.safetensors.index.json").exists()
    assert (tmp_path / "C" / "generation_config.json").exists()


def test_transformers_loads_a_merge_of_bfloat16(transformers: Any, tmp_path: Path) -> None:
    import torch

    models = [make_llama(transformers, seed, tied=True, dtype="bfloat16") for seed in range(2)]
    for name, model in zip("AB", models, strict=True):
        model.save_pretrained(tmp_path / name)
    paths = [tmp_path / "A", tmp_path / "B"]
    package.merge(model_path_list=paths, output_path=tmp_path / "C")
    expect_average(transformers, tmp_path / "C", models)
    assert load(transformers, tmp_path / "C").dtype == torch.bfloat16
    package.merge(model_path_list=paths, output_path=tmp_path / "D", output_dtype="float32")
    assert load(transformers, tmp_path / "D").dtype == torch.float32


def save_both(model: Any, folder: Path) -> None:
    """As tools that do not know of tied weights save them: the head as a tensor of its own."""
    model.save_pretrained(folder)
    state = {
        name: Stored("F32", tuple(value.shape), value.numpy().tobytes()) for name, value in model.state_dict().items()
    }
    make_model(folder, state, config=None)
    assert "lm_head.weight" in read_model(folder)


def save_bin(model: Any, folder: Path) -> None:
    """As torch.save keeps tied weights: two names of one storage."""
    import torch

    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


SAVERS: dict[str, Callable[[Any, Path], None]] = {
    "as transformers does": lambda model, folder: model.save_pretrained(folder), "both": save_both, "bin": save_bin,
}  # fmt: skip


@pytest.mark.parametrize("second", SAVERS)
@pytest.mark.parametrize("first", SAVERS)
@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_tied_weights_however_they_are_stored(
    transformers: Any, tmp_path: Path, first: str, second: str, kind: str
) -> None:
    models = [make_llama(transformers, seed, tied=True, kind=kind) for seed in range(2)]
    SAVERS[first](models[0], tmp_path / "A")
    SAVERS[second](models[1], tmp_path / "B")
    package.merge(model_path_list=[tmp_path / "A", tmp_path / "B"], output_path=tmp_path / "C")
    assert "lm_head.weight" not in read_model(tmp_path / "C")
    expect_average(transformers, tmp_path / "C", models)


@pytest.mark.parametrize("saver", SAVERS)
def test_untied_weights_however_they_are_stored(transformers: Any, tmp_path: Path, saver: str) -> None:
    models = [make_llama(transformers, seed, tied=False) for seed in range(2)]
    models[0].save_pretrained(tmp_path / "A")
    SAVERS[saver](models[1], tmp_path / "B")
    package.merge(model_path_list=[tmp_path / "A", tmp_path / "B"], output_path=tmp_path / "C")
    expect_average(transformers, tmp_path / "C", models)


def test_storage_shared_although_nothing_says_so(transformers: Any, tmp_path: Path) -> None:
    """A .bin whose head shares the embedding's storage, with a config.json that does not tie them."""
    import torch

    models = [make_llama(transformers, seed, tied=False) for seed in range(2)]
    for name, model in zip("AB", models, strict=True):
        model.lm_head.weight = model.model.embed_tokens.weight
        model.config.save_pretrained(tmp_path / name)
        torch.save(model.state_dict(), tmp_path / name / "pytorch_model.bin")
    package.merge(model_path_list=[tmp_path / "A", tmp_path / "B"], output_path=tmp_path / "C")
    state = load(transformers, tmp_path / "C").state_dict()
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
