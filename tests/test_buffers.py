"""What a model computes from its configuration is never merged, and need not be in every checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONFIG, Said, array, make_model, random_tensors, read_model

Run = Callable[..., Said]
MASK = np.tril(np.ones((5, 5), np.float32))[None, None]
#: What old releases of transformers have stored.
BUFFERS: dict[str, Any] = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.array([1, 0.1], np.float32),
    "model.layers.1.self_attn.rotary_emb.inv_freq": np.array([1, 0.1], np.float32),
    "transformer.rotary_pos_emb.inv_freq": np.array([1, 0.3], np.float32),
    "embeddings.position_ids": np.arange(6)[None],
    "position_ids": np.arange(6)[None],
    "h.0.attn.masked_bias": np.array(-10000.0, np.float32),
    "h.0.attn.bias": MASK,
    "gpt_neox.layers.0.attention.bias": MASK.astype(bool),
}
REASON = "computed from config.json, and not alike in every model"


def report_of(folder: Path) -> Any:
    return json.loads((folder / "merge_report.json").read_text())


def test_buffers_are_copied_and_biases_are_merged(merge: Run, tmp_path: Path) -> None:
    bias = {"h.1.attn.bias": np.ones(4, np.float32)}
    models = [make_model(tmp_path / name, {**random_tensors(1), **BUFFERS, **bias}) for name in "AB"]
    merge("--model_path_list", *models, "--weight_list", 2, 3, "--output_path", tmp_path / "C")
    merged, actions = read_model(tmp_path / "C"), report_of(tmp_path / "C")["tensors"]
    assert {name for name, entry in actions.items() if entry["action"] == "copied"} == BUFFERS.keys()
    for name, values in BUFFERS.items():
        np.testing.assert_array_equal(array(merged[name]), values)
    assert array(merged["h.1.attn.bias"]).tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize("holders", [(0,), (1,), (0, 2), (2,)], ids=str)
def test_buffers_that_not_all_hold_are_left_out(merge: Run, tmp_path: Path, holders: tuple[int, ...]) -> None:
    """Whoever holds them, two models or their base; every other tensor is merged as without them."""
    paths, bare = [], []
    for number, name in enumerate(("A", "B", "base")):
        tensors = random_tensors(number)
        bare.append(make_model(tmp_path / "bare" / name, tensors))
        extra = BUFFERS if number in holders else {}
        paths.append(make_model(tmp_path / name, {**extra, **tensors}))
    for models, out in ((paths, "C"), (bare, "D")):
        said = merge("--model_path_list", *models[:2], "--base_model_path", models[2], "--merge_method", "dare_ties",
                     "--output_path", tmp_path / out)  # fmt: skip
        listed = (
            f"{models[holders[0]]}: left out, as {REASON}: model.layers.*.self_attn.rotary_emb.inv_freq (2 tensors), "
        )
        assert (listed in said.err) == (models is paths)
    assert read_model(tmp_path / "C") == read_model(tmp_path / "D")
    inputs = report_of(tmp_path / "C")["inputs"]
    held = [{"because": REASON, "tensors": list(BUFFERS)}]
    assert [each.get("left_out") for each in inputs] == [held if number in holders else None for number in range(3)]
    assert [each["tensors"] for each in inputs] == [5 + len(BUFFERS) * (number in holders) for number in range(3)]


def test_those_that_share_their_memory(merge: Run, tmp_path: Path) -> None:
    shared = torch.tensor([1.0, 0.1])
    names = [f"model.layers.{number}.self_attn.rotary_emb.inv_freq" for number in range(3)]
    model = make_model(tmp_path / "A", random_tensors(1))
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text(json.dumps(CONFIG))
    tensors = {name: torch.from_numpy(each) for name, each in random_tensors(2).items()}
    torch.save({**dict.fromkeys(names, shared), **tensors}, old / "pytorch_model.bin")
    merge("--model_path_list", model, old, "--output_path", tmp_path / "C")
    assert read_model(tmp_path / "C").keys() == random_tensors(1).keys()
    assert report_of(tmp_path / "C")["inputs"][1]["left_out"] == [{"because": REASON, "tensors": names}]
    merge("--model_path_list", old, old, "--output_path", tmp_path / "D")
    assert set(names) & read_model(tmp_path / "D").keys()


def test_other_tensors_must_be_everywhere(refuse: Run, tmp_path: Path) -> None:
    """Buffers are not listed where something else is missing: it would not help to add them."""
    models = [make_model(tmp_path / "A", {**random_tensors(1), **BUFFERS, "h.1.attn.bias": np.ones(4, np.float32)}),
              make_model(tmp_path / "B", random_tensors(2))]  # fmt: skip
    said = refuse("merge", "--model_path_list", *models, "--output_path", tmp_path / "C",
                  says=[f"not in {models[1]}: h.1.attn.bias"])  # fmt: skip
    assert "inv_freq" not in str(said)


def test_buffers_of_other_types_and_shapes_are_left_out(merge: Run, tmp_path: Path) -> None:
    masks: dict[str, Any] = {
        "float16": MASK.astype(np.float16),
        "a byte": MASK.astype(np.uint8),
        "longer": np.ones((1, 1, 7, 7), "f"),
    }
    one = make_model(tmp_path / "A", {**random_tensors(1), "h.0.attn.bias": MASK})
    for name, mask in masks.items():
        two = make_model(tmp_path / name, {**random_tensors(2), "h.0.attn.bias": mask})
        merge("--model_path_list", one, two, "--output_path", tmp_path / f"C {name}")
        assert "h.0.attn.bias" not in read_model(tmp_path / f"C {name}")


def test_a_name_that_is_a_mask_and_a_bias_is_neither(refuse: Run, tmp_path: Path) -> None:
    owns: dict[str, dict[str, Any]] = {
        "A": {"h.0.attn.bias": MASK}, "B": {"h.0.attn.bias": np.ones(4, np.float32)}, "C": {},
    }  # fmt: skip
    models = [make_model(tmp_path / name, {**random_tensors(1), **own}) for name, own in owns.items()]
    refuse("merge", "--model_path_list", *models, "--output_path", tmp_path / "D",
           says=[f"not in {models[2]}: h.0.attn.bias"])  # fmt: skip


def test_models_of_nothing_but_buffers(refuse: Run, tmp_path: Path) -> None:
    models = [make_model(tmp_path / "A", {"a.inv_freq": np.ones(2, "f")}),
              make_model(tmp_path / "B", {"position_ids": np.arange(2)})]  # fmt: skip
    refuse("check", "--model_path_list", *models, says=["no tensors to merge"])
