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
