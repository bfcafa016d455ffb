"""Real classes of diffusers in tiny sizes, as it saves them: merged, loaded clean, and equal to a merge by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_models import make

import modelfuse

pytestmark = pytest.mark.filterwarnings("ignore")
torch = pytest.importorskip("torch", reason="merges models of diffusers")
diffusers = pytest.importorskip("diffusers", reason="merges models of diffusers, which is missing")

#: A class, its settings, and what goes into it beside the noisy image.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "UNet": ("UNet2DConditionModel", {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (4, 8),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 8,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 2, "norm_num_groups": 2},
        {"timestep": 3, "encoder_hidden_states": torch.ones(1, 2, 8)}),
    "DiT": ("DiTTransformer2DModel", {
        "num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 4, "out_channels": 8, "num_layers": 1,
        "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_num_groups": 2},
        {"timestep": torch.tensor([3]), "class_labels": torch.tensor([1])}),
}  # fmt: skip


def create(case: str, noise: int) -> Any:
    cls, settings, _ = CASES[case]
    return make(lambda: getattr(diffusers, cls)(**settings), noise)


@pytest.mark.parametrize("case", CASES)
def test_a_merge_loads_clean_and_computes_what_a_merge_by_hand_does(tmp_path: Path, case: str) -> None:
    models = {name: create(case, noise) for name, noise in (("base", 1), ("a", 2), ("b", 3))}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    inputs: dict[str, Any] = {"base_model_path": tmp_path / "base",
                              "model_path_list": [tmp_path / "a", tmp_path / "b"]}  # fmt: skip
    assert not modelfuse.check(**inputs).warnings
    modelfuse.merge(**inputs, output_path=tmp_path / "out", merge_method="linear", weight_list=[0.75, 0.25])
    loaded, info = type(models["base"]).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[each] for each in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected, states = create(case, 0), [models[name].state_dict() for name in "ab"]
    expected.load_state_dict({
        name: (0.75 * one.double() + 0.25 * states[1][name].double()).float() if one.is_floating_point() else one
        for name, one in states[0].items()
    })  # fmt: skip
    image = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8)
    with torch.no_grad():
        got, want = (each.eval()(image, **CASES[case][2]).sample.numpy() for each in (loaded, expected))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
