"""Files and folders as people have them: other names and endings, variants, what training leaves."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Said, array, make_model, read_file, read_model, save_file

import modelfuse

TENSORS = {"conv_in.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "scale": np.ones(3, np.float32)}
TWICE = {name: each * 2 for name, each in TENSORS.items()}


def unet(folder: Path, name: str, tensors: dict[str, np.ndarray] = TENSORS, shards: int = 1) -> Path:
    """A part of a pipeline of diffusers."""
    make_model(folder, {}, config={"_class_name": "UNet2DConditionModel"})
    (folder / "model.safetensors").unlink()
    stem, _, variant = name.partition(".")
    if shards == 1:
        save_file(folder / f"{name}.safetensors", tensors)
        return folder
    weight_map = {}
    for number, (each, values) in enumerate(tensors.items(), 1):
        weight_map[each] = f"{name}-{number:05d}-of-{shards:05d}.safetensors"
        save_file(folder / weight_map[each], {each: values})
    index = f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("name", ["diffusion_pytorch_model", "diffusion_pytorch_model.fp16", "model.fp16"])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_names_of_diffusers_and_of_variants_are_kept(tmp_path: Path, name: str, shards: int) -> None:
    models = [unet(tmp_path / "A", name, shards=shards), unet(tmp_path / "B", name, TWICE, shards=shards)]
    modelfuse.merge(model_path_list=models, output_path=tmp_path / "out", max_shard_size=100 if shards > 1 else 10**9)
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {each.replace("A/", "") for each in made} >= {path.name for path in models[0].iterdir()}
    assert modelfuse.verify(tmp_path / "out", full=True).holds
    again = [tmp_path / "out", models[0]]
    modelfuse.merge(model_path_list=again, output_path=tmp_path / "again")
    got = read_file(tmp_path / "again" / f"{name}.safetensors")[0]
    np.testing.assert_allclose(array(got["conv_in.weight"]), TENSORS["conv_in.weight"] * 1.25)
    modelfuse.merge(model_path_list=models, output_path=tmp_path / "again", overwrite=True)


def test_a_file_of_diffusers_may_be_named(tmp_path: Path) -> None:
    name = "diffusion_pytorch_model.fp16"
    files = [unet(tmp_path / each, name) / f"{name}.safetensors" for each in "AB"]
    modelfuse.merge(model_path_list=files, output_path=tmp_path / "out")
    assert (tmp_path / "out" / f"{name}.safetensors").is_file()


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth"])
def test_other_endings_of_torch_s_format(tmp_path: Path, suffix: str) -> None:
    """As Lightning saves it, whose callbacks' states lie under their classes."""
    torch = pytest.importorskip("torch", reason="makes files of torch")
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"]
    made = {each: types.ModuleType(each) for each in names}
    callback = type("ModelCheckpoint", (), {"__module__": names[-1]})
    made[names[-1]].ModelCheckpoint = callback  # type: ignore[attr-defined]
    sys.modules.update(made)
    try:
        for each, tensors in (("A", TENSORS), ("B", TWICE)):
            state = {name: torch.from_numpy(values) for name, values in tensors.items()}
            content = {"state_dict": state, "global_step": 3, "callbacks": {callback: {"best": 1.0}},
                       "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}]}  # fmt: skip
            torch.save(content, tmp_path / f"{each}{suffix}")
    finally:
        for each in names:
            del sys.modules[each]
    modelfuse.merge(model_path_list=[tmp_path / f"{each}{suffix}" for each in "AB"], output_path=tmp_path / "out")
    np.testing.assert_allclose(array(read_model(tmp_path / "out")["scale"]), 1.5)


def test_what_a_folder_without_a_model_holds_is_told(tmp_path: Path, refuse: Callable[..., str]) -> None:
    good = make_model(tmp_path / "good", TENSORS)

    def check(files: list[str], says: str, folders: tuple[str, ...] = ()) -> None:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name in files:
            (folder / name).write_bytes(b"")
        for name in folders:
            (folder / name).mkdir()
        refuse("check", "--model_path_list", folder, good, says=[f"{folder} holds no checkpoint"],
               hint=says.format(folder))  # fmt: skip

    check(["weights.safetensors", "a.json"], "There is weights.safetensors: name the file itself, such as {}/weights")
    check(["x.ckpt", "y.pt"], "There are x.ckpt, y.pt: name the file itself")
    check(["model.fp16.safetensors", "model.fp32.safetensors"], "There are model.fp16.safetensors, model.fp32")
    check(["config.json"], "such as {}/checkpoint-1000.", ("checkpoint-200", "checkpoint-1000"))
    check(["model_index.json"], "such as {}/unet")
    check(["zero_to_fp32.py", "latest"], "zero_to_fp32.py", ("global_step5",))
    check([], "It holds nothing")
    check(["notes.txt"], "It holds notes.txt. A file with weights may be named")


def test_what_trainers_leave_stays_out_of_the_output(tmp_path: Path, merge: Callable[..., Said]) -> None:
    left = {"latest": "global_step5", "zero_to_fp32.py": "1", "saved_signal_0": "1", "trainer_log.jsonl": "{}",
            "rng_state_0.pth": "x", "training_loss.png": "x", "tokenizer.json": "{}"}  # fmt: skip
    model = make_model(tmp_path / "A", TENSORS, files=left)
    merge("--model_path_list", model, make_model(tmp_path / "B", TWICE), "--output_path", tmp_path / "out")
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made & left.keys() == {"tokenizer.json"}


def stable_diffusion(seed: int) -> dict[str, np.ndarray]:
    """A whole pipeline under the names of those who published it."""
    draw = np.random.default_rng(seed)
    shapes = {
        "model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (8, 8),
        "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.k_proj.weight": (8, 8),
    }
    made: dict[str, np.ndarray] = {name: draw.standard_normal(each).astype(np.float16) for name, each in shapes.items()}
    position = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    return made | {position: np.arange(7)[None], "alphas_cumprod": np.linspace(1, 0, 5, dtype=np.float32)}


@pytest.mark.parametrize("suffixes", [(".safetensors", ".safetensors"), (".ckpt", ".ckpt"), (".ckpt", ".safetensors")])
def test_a_pipeline_in_one_file_stays_in_one(
    merge: Callable[..., Said], tmp_path: Path, suffixes: tuple[str, str]
) -> None:
    """Its loaders find no shards; it has no config.json, and wants none."""
    torch = pytest.importorskip("torch", reason="makes files of torch")
    files = []
    for seed, suffix in enumerate(suffixes):
        state = stable_diffusion(seed)
        files.append(tmp_path / f"{seed}{suffix}")
        if suffix == ".ckpt":
            tensors = {name: torch.from_numpy(each) for name, each in state.items()}
            torch.save({"state_dict": tensors, "global_step": seed, "pytorch-lightning_version": "1.4.2"}, files[-1])
        else:
            save_file(files[-1], state)
    out = tmp_path / "out"
    said = merge("--model_path_list", *files, "--output_path", out, "--max_shard_size", "200B")
    assert "server" not in said.err
    assert f"  StableDiffusionPipeline.from_single_file('{out}/model.safetensors')  # of diffusers" in said.out
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    got, (one, two) = read_file(out / "model.safetensors")[0], (stable_diffusion(seed) for seed in range(2))
    assert got.keys() == one.keys()
    for name, each in got.items():
        want = one[name] if one[name].dtype.kind == "i" else (one[name].astype(np.float32) + two[name]) / 2
        np.testing.assert_array_equal(array(each), want.astype(one[name].dtype))
    assert modelfuse.verify(out, full=True).holds
