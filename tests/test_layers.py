"""Layers of any architecture, found from names and config.json; config.json of other layers."""

from __future__ import annotations

from typing import Any

import pytest

from modelfuse.checkpoints.layer_config import with_layers
from modelfuse.checkpoints.layer_stacks import Stack, comes_first, find_stacks, module_of


def layers(**counts: int) -> list[str]:
    """Names of tensors: one a layer of each prefix, whose dots are written as two underscores."""
    return [
        f"{prefix.replace('__', '.')}.{layer}.attn.weight" for prefix, count in counts.items() for layer in range(count)
    ]


MODELS: dict[str, tuple[list[str], dict[str, Any], dict[str, tuple[str, int, list[str]]]]] = {
    "llama": (layers(model__layers=3), {"num_hidden_layers": 3, "num_attention_heads": 3},
              {"default": ("model.layers.", 3, ["num_hidden_layers"])}),
    "gpt2": (layers(h=2), {"n_layer": 2, "n_head": 2}, {"default": ("h.", 2, ["n_layer"])}),
    "qwen2": (layers(model__layers=4), {"num_hidden_layers": 4, "max_window_layers": 4},
              {"default": ("model.layers.", 4, ["num_hidden_layers"])}),
    "mamba": (layers(backbone__layers=4), {"num_hidden_layers": 4, "n_layer": 4},
              {"default": ("backbone.layers.", 4, ["num_hidden_layers", "n_layer"])}),
    "one layer of experts": (
        [f"model.layers.0.moe.experts.{expert}.w1.weight" for expert in range(4)], {"num_hidden_layers": 1},
        {"default": ("model.layers.", 1, ["num_hidden_layers"])}),
    "layers that predict more tokens": (
        layers(model__layers=4), {"num_hidden_layers": 3, "num_nextn_predict_layers": 1},
        {"default": ("model.layers.", 3, ["num_hidden_layers"])}),
    "t5": ([*layers(encoder__block=2, decoder__block=2), "encoder.block.0.layer.1.wi.weight", "shared.weight"],
           {"num_layers": 2, "num_decoder_layers": 2, "d_kv": 2},
           {"encoder": ("encoder.block.", 2, ["num_layers"]),
            "decoder": ("decoder.block.", 2, ["num_decoder_layers"])}),
    "whisper": (layers(model__encoder__layers=2, model__decoder__layers=2),
                {"encoder_layers": 2, "decoder_layers": 2, "num_hidden_layers": 2},
                {"encoder": ("model.encoder.layers.", 2, ["encoder_layers", "num_hidden_layers"]),
                 "decoder": ("model.decoder.layers.", 2, ["decoder_layers"])}),
    "qwen2 vl": (layers(model__language_model__layers=2, model__visual__blocks=2),
                 {"num_hidden_layers": 2, "vision_config": {"depth": 2}, "text_config": {"num_hidden_layers": 2}},
                 {"text_decoder": ("model.language_model.layers.", 2,
                                   ["num_hidden_layers", "text_config.num_hidden_layers"]),
                  "visual": ("model.visual.blocks.", 2, ["vision_config.depth"])}),
    "a projection in two steps is no stack": (
        [*layers(model__layers=3), "mm_projector.0.weight", "mm_projector.2.weight"], {"num_hidden_layers": 3},
        {"default": ("model.layers.", 3, ["num_hidden_layers"])}),
    "an architecture of tomorrow": (layers(net__cells=6), {"deep": {"num_cell_layers": 6}},
                                    {"default": ("net.cells.", 6, ["deep.num_cell_layers"])}),
    "no config": (layers(model__layers=3), {}, {"default": ("model.layers.", 3, [])}),
    "no layers": (["model.norm.weight"], {"num_hidden_layers": 3}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_layers_of_any_architecture_are_found(name: str) -> None:
    names, config, expected = MODELS[name]
    found = {stack.module: (stack.prefix, stack.count, [".".join(key) for key in stack.keys])
             for stack in find_stacks(names, config)}  # fmt: skip
    assert found == expected


def test_a_tensor_belongs_to_a_layer_and_a_module() -> None:
    stacks = find_stacks(*MODELS["qwen2 vl"][:2])
    assert module_of("model.visual.merger.mlp.0.weight", stacks) == "visual"
    assert module_of("multi_modal_projector.linear.weight", stacks) == "multi_modal_projector"
    assert module_of("lm_head.weight", stacks) == "text_decoder"
    text = stacks[0]
    assert text.layer_of("model.language_model.layers.1.attn.weight") == 1
    assert text.layer_of("model.visual.blocks.1.attn.weight") is None
    assert (
        text.renamed("model.language_model.layers.1.mlp.experts.3.w", 7)
        == "model.language_model.layers.7.mlp.experts.3.w"
    )
    t5 = find_stacks(*MODELS["t5"][:2])
    assert [module_of(name, t5) for name in ("shared.weight", "lm_head.weight", "decoder.final_layer_norm.weight")] == [
        "shared", "shared", "decoder",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("model.embed_tokens.weight", True), ("shared.weight", True),
        ("gpt_neox.embed_in.weight", True), ("bert.embeddings.LayerNorm.weight", True), ("wte.weight", True),
        ("embed_out.weight", False), ("lm_head.weight", False), ("model.norm.weight", False), ("ln_f.bias", False),
        ("score.weight", False), ("member.weight", False),
    ],
)  # fmt: skip
def test_embeddings_come_before_the_layers(name: str, first: bool) -> None:
    assert comes_first(name) == first


def config_of(config: dict[str, Any], order: list[int], **more: Any) -> dict[str, Any]:
    """config.json of four layers, for others."""
    whole = {"num_hidden_layers": 4} | config
    stack = Stack("default", "model.layers.", "", 4, (("num_hidden_layers",),))
    changed, notes = with_layers(whole, stack, [(whole | more, layer) for layer in order])
    assert changed.pop("num_hidden_layers") == len(order)
    return changed | ({"notes": notes} if notes else {})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"layer_types": list("abcd")}, {"layer_types": list("aaddc")}),
        ({"hybrid_override_pattern": "M*M-"}, {"hybrid_override_pattern": "MM--M"}),
        ({"num_kv_heads": [1, 2, 3, 4]}, {"num_kv_heads": [1, 1, 4, 4, 3]}),
        ({"mlp_only_layers": [0, 3]}, {"mlp_only_layers": [0, 1, 2, 3]}),
        ({"mlp_only_layers": []}, {"mlp_only_layers": []}),
        ({"max_window_layers": 4}, {"max_window_layers": 5}),
        ({"max_window_layers": 2}, {"max_window_layers": 2}),
        ({"eos_token_id": [1, 2, 3, 4]}, {"eos_token_id": [1, 2, 3, 4]}),
        ({"num_nextn_predict_layers": 1}, {"num_nextn_predict_layers": 0}),
        ({"rope_scaling": {"short_factor": [1, 2, 3, 4]}}, {"rope_scaling": {"short_factor": [1, 2, 3, 4]}}),
        ({"first_k_dense_replace": 2}, {"first_k_dense_replace": 2, "notes": [
            "config.json says by first_k_dense_replace: 2 of which kind layers are, which was left as it is"]}),
    ],
)  # fmt: skip
def test_what_config_json_says_of_each_layer_goes_with_it(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert config_of(before, [0, 0, 3, 3, 2]) == after


def test_each_layer_is_what_its_own_model_says() -> None:
    assert config_of({"layer_types": list("abcd")}, [0, 3], layer_types=list("wxyz")) == {"layer_types": ["w", "z"]}


def test_all_keys_of_a_stack_are_changed_and_no_others() -> None:
    names, config, _ = MODELS["qwen2 vl"]
    config = config | {"text_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"]}}
    text = find_stacks(names, config)[0]
    changed, _ = with_layers(config, text, [(config, 1), (config, 1), (config, 0)])
    assert changed == {
        "num_hidden_layers": 3,
        "vision_config": {"depth": 2},
        "text_config": {"num_hidden_layers": 3, "layer_types": ["b", "b", "a"]},
    }
    assert config["num_hidden_layers"] == 2


def test_a_config_without_their_number_is_told() -> None:
    stack = Stack("default", "model.layers.", "", 4, ())
    assert with_layers({"a": 1}, stack, [({}, 0)]) == (
        {"a": 1},
        ["config.json has no number of layers that is 4: none was changed"],
    )
