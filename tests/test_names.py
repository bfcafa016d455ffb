"""The same tensors under other names: prefixes, loaders' renames, experts in one tensor or apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import array, make_model, read_model

import modelfuse

CONFIG = {"model_type": "made-up"}
SHAPES: dict[str, tuple[int, ...]] = {
    "embed_tokens.weight": (7, 4), "layers.0.self_attn.q_proj.weight": (4, 4), "layers.0.mlp.up_proj.weight": (6, 4),
    "layers.1.self_attn.q_proj.weight": (4, 4), "layers.1.mlp.up_proj.weight": (6, 4), "norm.weight": (4,),
}  # fmt: skip
Tensors = dict[str, np.ndarray]


def noise(seed: int, shapes: dict[str, tuple[int, ...]]) -> Tensors:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def average(tmp_path: Path, one: Tensors, other: Tensors, **settings: Any) -> tuple[Tensors, list[str]]:
    """Both merged under the first one's names, and what is told."""
    models = [make_model(tmp_path / name, each, config=CONFIG) for name, each in (("A", one), ("B", other))]
    plan = modelfuse.check(model_path_list=models, **settings)
    modelfuse.merge(model_path_list=models, output_path=tmp_path / "out", overwrite=True, **settings)
    assert modelfuse.verify(tmp_path / "out", full=True).holds
    return {name: array(each) for name, each in read_model(tmp_path / "out").items()}, [*plan.notes]


PLAIN: dict[str, tuple[int, ...]] = {f"model.{name}": shape for name, shape in SHAPES.items()}
OTHERS: dict[str, Callable[[str], str]] = {
    "DDP": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "compile inside": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "FSDP and checkpointing": lambda name: name.replace(
        "layers.1.", "_fsdp_wrapped_module.layers.1._checkpoint_wrapped_module."
    ),
    "PEFT": lambda name: f"base_model.model.{name}",
    "without model.": lambda name: name.removeprefix("model."),
    "a class's names of a language model": lambda name: name.replace("model.", "model.language_model."),
    "the hub's names of a language model": lambda name: name.replace("model.", "language_model.model."),
    "any prefix": lambda name: f"some_encoder.{name}",
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("lead", [0, 1])
def test_prefixes(tmp_path: Path, case: str, lead: int) -> None:
    one, two = noise(1, PLAIN), noise(2, PLAIN)
    renamed = {OTHERS[case](name): each for name, each in two.items()}
    models = (one, renamed) if lead == 0 else (renamed, one)
    got, notes = average(tmp_path, *models)
    assert got.keys() == models[0].keys()
    for name, each in one.items():
        own = name if lead == 0 else OTHERS[case](name)
        np.testing.assert_allclose(got[own], (each + two[name]) / 2, rtol=1e-6, err_msg=name)
    assert any("in the output (" in note for note in notes), notes


def test_what_loaders_rename(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "bert.encoder.LayerNorm.weight": (4,), "bert.encoder.LayerNorm.bias": (4,), "bert.encoder.dense.weight": (4, 3),
        "conv.parametrizations.weight.original0": (1, 1, 5), "conv.parametrizations.weight.original1": (4, 2, 5),
    }  # fmt: skip
    one, two = noise(1, shapes), noise(2, shapes)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta",
           "parametrizations.weight.original0": "weight_g",
           "parametrizations.weight.original1": "weight_v"}  # fmt: skip

    def renamed(name: str) -> str:
        return next((name.replace(new, each) for new, each in old.items() if new in name), name)

    got, notes = average(tmp_path, one, {renamed(name): each for name, each in two.items()})
    assert got.keys() == one.keys()
    for name, each in one.items():
        np.testing.assert_allclose(got[name], (each + two[name]) / 2, rtol=1e-6, err_msg=name)
    assert any("LayerNorm.gamma is bert.encoder.LayerNorm.weight" in note for note in notes), notes


def experts(seed: int) -> tuple[Tensors, Tensors]:
    """The same experts, one by one and in one tensor."""
    layer, random = "model.layers.0.mlp", np.random.default_rng(seed)
    apart: Tensors = {f"{layer}.gate.weight": random.standard_normal((3, 4)).astype(np.float32)}
    for expert in range(3):
        for part, shape in (("gate_proj", (5, 4)), ("up_proj", (5, 4)), ("down_proj", (4, 5))):
            apart[f"{layer}.experts.{expert}.{part}.weight"] = random.standard_normal(shape).astype(np.float32)
    parts = [{name.removesuffix(".weight").rpartition(".")[2]: each for name, each in apart.items()
              if f".experts.{expert}." in name} for expert in range(3)]  # fmt: skip
    fused = {f"{layer}.gate.weight": apart[f"{layer}.gate.weight"],
             f"{layer}.experts.gate_up_proj": np.stack([np.concatenate([each["gate_proj"], each["up_proj"]])
                                                        for each in parts]),
             f"{layer}.experts.down_proj": np.stack([each["down_proj"] for each in parts])}  # fmt: skip
    return apart, fused


@pytest.mark.parametrize("lead", ["apart", "fused"])
def test_experts_in_one_tensor_or_apart(tmp_path: Path, lead: str) -> None:
    """Either way round, to the bit, in one slice or in small ones."""
    (apart, fused), (other_apart, other_fused) = experts(1), experts(2)
    models = (apart, other_fused) if lead == "apart" else (fused, other_apart)
    want = (apart, other_apart) if lead == "apart" else (fused, other_fused)
    for memory in (10**9, 1):
        got, notes = average(tmp_path, *models, memory=memory)
        assert got.keys() == want[0].keys()
        for name, each in want[0].items():
            assert np.array_equal(got[name], (each / 2 + want[1][name] / 2).astype(np.float32)), name
        assert any("experts are stored otherwise" in note for note in notes)


def test_a_language_model_is_never_looked_for_in_a_vision_tower(tmp_path: Path, refuse: Callable[..., str]) -> None:
    vision = {f"vision_tower.{name}": shape for name, shape in SHAPES.items()}
    one = make_model(tmp_path / "A", noise(1, PLAIN | {"x.weight": (2,)}), config=CONFIG)
    other = make_model(tmp_path / "B", noise(2, vision | {"x.weight": (2,)}), config=CONFIG)
    refuse("check", "--model_path_list", one, other, says=["vision_tower.layers.*.mlp.up_proj.weight"])


def test_two_names_of_one_key_are_left_alone(tmp_path: Path) -> None:
    both = {f"{part}.{name}": shape for part in ("model", "language_model") for name, shape in SHAPES.items()}
    one, two = noise(1, both), noise(2, both)
    got, _ = average(tmp_path, one, two)
    for name, each in one.items():
        np.testing.assert_allclose(got[name], (each + two[name]) / 2, rtol=1e-6, err_msg=name)
