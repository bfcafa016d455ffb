"""Adapters of other kinds than LoRA on Linear layers, as PEFT makes and merges them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Said, array, read_model, save_file

import modelfuse

pytestmark = pytest.mark.filterwarnings("ignore")
WHY = "compares with PEFT"
transformers = pytest.importorskip("transformers", reason=WHY)
torch = pytest.importorskip("torch", reason=WHY)
peft = pytest.importorskip("peft", reason=WHY)
DIMS = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def llama(**more: Any) -> Any:
    return transformers.LlamaForCausalLM, transformers.LlamaConfig(**DIMS, **more)


def qwen2() -> Any:
    return transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**DIMS)


def qwen3_moe(**more: Any) -> Any:
    sizes = {"head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, **more}
    return transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig(**DIMS, **sizes)


def square_moe() -> Any:
    """Nothing tells from the shapes which way round an expert is."""
    return qwen3_moe(moe_intermediate_size=16)


def mixtral() -> Any:
    return transformers.MixtralForCausalLM, transformers.MixtralConfig(**DIMS, num_local_experts=4)


def deepseek() -> Any:
    sizes = {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
             "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
             "v_head_dim": 8, "qk_nope_head_dim": 4}  # fmt: skip
    return transformers.DeepseekV3ForCausalLM, transformers.DeepseekV3Config(
        **{**DIMS, "num_key_value_heads": 4}, **sizes
    )


def gpt_oss(**more: Any) -> Any:
    sizes = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.GptOssForCausalLM, transformers.GptOssConfig(**{**DIMS, **more}, **sizes)


def square_gpt_oss() -> Any:
    return gpt_oss(intermediate_size=32)


def convolutions() -> Any:
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2
    )
    return transformers.ResNetForImageClassification, config


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "all-linear of Qwen3-MoE": (qwen3_moe, lambda: peft.LoraConfig(r=2, target_modules="all-linear")),
    "experts of Qwen3-MoE": (
        square_moe,
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS),
    ),
    "one parameter, ranks by patterns": (
        qwen3_moe,
        lambda: peft.LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS[1:], use_rslora=True,
                                rank_pattern={"experts.down_proj": 3}, alpha_pattern={"experts.down_proj": 5}),
    ),
    "all-linear of Mixtral": (mixtral, lambda: peft.LoraConfig(r=2, target_modules="all-linear")),
    "all-linear of DeepSeek-V3": (deepseek, lambda: peft.LoraConfig(r=2, target_modules="all-linear")),
    "gpt-oss": (gpt_oss, lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS)),
    "square gpt-oss": (square_gpt_oss, lambda: peft.LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS)),
    "router": (qwen3_moe, lambda: peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.gate.weight"])),
    "trainable tokens beside LoRA": (
        llama,
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[7, 3]),
    ),
    "trainable tokens of both matrices": (
        llama,
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj"],
                                trainable_token_indices={"embed_tokens": [3], "lm_head": [5, 47]}),
    ),
    "trainable tokens alone": (llama, lambda: peft.TrainableTokensConfig(token_indices=[0, 9])),
    "trainable tokens of tied matrices": (
        lambda: llama(tie_word_embeddings=True),
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[7, 3]),
    ),
    "lora_bias": (qwen2, lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"], lora_bias=True)),
    "LoHa": (llama, lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "up_proj", "down_proj"])),
    "LoHa of convolutions": (
        convolutions, lambda: peft.LoHaConfig(r=2, target_modules=["convolution"], init_weights=False),
    ),
    "LoHa of convolutions with a core": (
        convolutions,
        lambda: peft.LoHaConfig(r=2, target_modules=["convolution"], use_effective_conv2d=True, init_weights=False),
    ),
    "LoKr": (llama, lambda: peft.LoKrConfig(r=2, target_modules=["q_proj", "up_proj", "down_proj"])),
    "LoKr of two products": (
        llama,
        lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=["q_proj", "up_proj"], decompose_both=True,
                                decompose_factor=4, rank_pattern={"up_proj": 2}),
    ),
    "LoKr of convolutions with a core": (
        convolutions,
        lambda: peft.LoKrConfig(r=2, target_modules=["convolution"], use_effective_conv2d=True, init_weights=False),
    ),
    "IA3": (
        qwen2,
        lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
}  # fmt: skip


def train(make: Callable[[], Any], settings: Any, folder: Path, dtype: Any = torch.float32) -> Any:
    """A model with an adapter that seems to be trained; its base and the adapter are saved."""
    torch.manual_seed(0)
    cls, config = make()
    model = cls(config).to(dtype).eval()
    model.save_pretrained(folder / "base")
    trained = peft.get_peft_model(model, settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    trained.eval().save_pretrained(folder / "adapter")
    return trained


@pytest.mark.parametrize("case", CASES)
def test_merge_and_unload(tmp_path: Path, case: str) -> None:
    make, settings = CASES[case]
    trained = train(make, settings(), tmp_path)
    modelfuse.merge(
        lora_model_path=tmp_path / "adapter", base_model_path=tmp_path / "base", output_path=tmp_path / "out"
    )
    trained.merge_and_unload().save_pretrained(tmp_path / "peft")
    got, want, base = (read_model(tmp_path / name) for name in ("out", "peft", "base"))
    assert got.keys() == want.keys() == base.keys()
    changed = 0
    for name, each in want.items():
        np.testing.assert_allclose(array(got[name]), array(each), rtol=0, atol=1e-6, err_msg=name)
        changed += not np.array_equal(array(each), array(base[name]))
        assert np.array_equal(array(each), array(base[name])) == (got[name] == base[name]), name
    assert changed
    assert modelfuse.verify(tmp_path / "out", full=True).holds


@pytest.mark.parametrize("case", ["all-linear of Qwen3-MoE", "trainable tokens beside LoRA", "LoHa", "LoKr", "IA3"])
def test_bfloat16_is_rounded_once(tmp_path: Path, case: str) -> None:
    make, settings = CASES[case]
    trained = train(make, settings(), tmp_path, torch.bfloat16)
    modelfuse.merge(
        lora_model_path=tmp_path / "adapter", base_model_path=tmp_path / "base", output_path=tmp_path / "out"
    )
    trained.float().merge_and_unload().save_pretrained(tmp_path / "peft")
    got, want = (read_model(tmp_path / name) for name in ("out", "peft"))
    assert {each.dtype for each in got.values()} == {"BF16"}
    for name, each in want.items():
        exact = array(each)
        once = torch.from_numpy(exact).bfloat16().float().numpy()
        assert (np.abs(array(got[name]) - exact) <= np.abs(once - exact) + 1e-6).all(), name


def test_experts_that_the_base_has_in_one_tensor(tmp_path: Path) -> None:
    """As a class's state dict has them; the adapter is of all experts, or as transformers 4 made it, one of each."""
    trained = train(qwen3_moe, CASES["all-linear of Qwen3-MoE"][1](), tmp_path)
    cls, config = qwen3_moe()
    torch.manual_seed(0)
    fused = {name: each.numpy() for name, each in cls(config).state_dict().items()}
    save_file(tmp_path / "base" / "model.safetensors", fused)
    a, b = (np.random.default_rng(seed).standard_normal(shape).astype(np.float32) for seed, shape in
            ((1, (2, 32)), (2, (24, 2))))  # fmt: skip
    layer = "base_model.model.model.layers.1.mlp.experts.3.up_proj"
    (tmp_path / "one").mkdir()
    factors = {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    save_file(tmp_path / "one" / "adapter_model.safetensors", factors)
    (tmp_path / "one" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    for name in ("adapter", "one"):
        modelfuse.merge(
            lora_model_path=tmp_path / name, base_model_path=tmp_path / "base", output_path=tmp_path / f"out_{name}"
        )
    want = {name: each.numpy() for name, each in trained.merge_and_unload().state_dict().items()}
    got = read_model(tmp_path / "out_adapter")
    assert got.keys() == want.keys() == fused.keys()
    for name, each in want.items():
        np.testing.assert_allclose(array(got[name]), each, rtol=0, atol=1e-6, err_msg=name)
    got = read_model(tmp_path / "out_one")
    whole = "model.layers.1.mlp.experts.gate_up_proj"
    fused[whole][3, 24:] += b @ a
    for name, each in fused.items():
        np.testing.assert_allclose(array(got[name]), each, rtol=0, atol=1e-6, err_msg=name)


def test_parts_of_a_multimodal_model_find_their_places(tmp_path: Path) -> None:
    """The base has the hub's names, which differ from the class's in each part; some of both parts end alike."""
    text = {**DIMS, "vocab_size": 64, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 7}  # fmt: skip

    def gemma3() -> Any:
        return transformers.Gemma3ForConditionalGeneration, transformers.Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=60, boi_token_index=61,
            eoi_token_index=62,
        )  # fmt: skip

    trained = train(gemma3, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), tmp_path)
    from safetensors.numpy import load_file

    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    hub = {name: re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name) for name in tensors}
    save_file(file, {hub[name]: each for name, each in tensors.items()})
    plan = modelfuse.check(lora_model_path=tmp_path / "adapter", base_model_path=tmp_path / "base")
    told = [note for note in plan.notes if "in the output" in note]
    assert any("model.language_model.… is language_model.model.…" in note for note in told)
    modelfuse.merge(
        lora_model_path=tmp_path / "adapter", base_model_path=tmp_path / "base", output_path=tmp_path / "out"
    )
    trained.merge_and_unload().save_pretrained(tmp_path / "peft")
    got, want = (read_model(tmp_path / name) for name in ("out", "peft"))
    assert got.keys() == set(hub.values())
    for name, each in want.items():
        np.testing.assert_allclose(array(got[hub[name]]), array(each), rtol=0, atol=1e-6, err_msg=name)


def test_a_pissa_adapter_that_was_converted(tmp_path: Path, refuse: Callable[..., str]) -> None:
    torch.manual_seed(0)
    cls, config = llama()
    model = cls(config).eval()
    model.save_pretrained(tmp_path / "base")
    trained = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa")
    )
    trained.peft_config["default"].init_lora_weights = True
    trained.save_pretrained(tmp_path / "before")
    trained.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    trained.save_pretrained(tmp_path / "raw")
    words = ["--base_model_path", tmp_path / "base", "--output_path", tmp_path / "out"]
    hint = "path_initial_model_for_weight_conversion"
    refuse("merge", "--lora_model_path", tmp_path / "raw", *words, says=["pissa"], hint=hint)
    trained.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "before"))
    modelfuse.merge(
        lora_model_path=tmp_path / "adapter", base_model_path=tmp_path / "base", output_path=tmp_path / "out"
    )
    trained.merge_and_unload().save_pretrained(tmp_path / "peft")
    got, want = (read_model(tmp_path / name) for name in ("out", "peft"))
    for name, each in want.items():
        np.testing.assert_allclose(array(got[name]), array(each), rtol=0, atol=2e-6, err_msg=name)


def test_parts_that_are_missing_or_do_not_fit(
    tmp_path: Path, modelfuse: Callable[..., Said], refuse: Callable[..., str]
) -> None:
    train(llama, CASES["LoKr"][1](), tmp_path)
    words = ["--lora_model_path", tmp_path / "adapter", "--base_model_path", tmp_path / "base",
             "--output_path", tmp_path / "out"]  # fmt: skip
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    from safetensors.numpy import load_file

    tensors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lokr_w2_b"
    save_file(file, {each: value for each, value in tensors.items() if each != name})
    refuse("merge", *words, says=["missing", "q_proj"])
    save_file(file, tensors | {name: np.zeros((2, 9), np.float32)})
    refuse("merge", *words, says=["cannot go into model.layers.0.self_attn.q_proj.weight"])
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "LOHA"}))
    refuse("merge", *words, says=["another kind of adapter than LOHA"])
    config.write_text(json.dumps({"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 48]}))
    save_file(file, {"base_model.model.model.embed_tokens.trainable_tokens_delta": np.zeros((2, 32), np.float32)})
    refuse("merge", *words, says=["cannot go into model.embed_tokens.weight"])
    config.write_text(json.dumps({"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, "2"]}))
    refuse("merge", *words, says=["token_indices is"])


@pytest.mark.parametrize("case", ["DoRA", "IA3"])
def test_what_an_adapter_changed_counts_as_merged(tmp_path: Path, merge: Callable[..., Said], case: str) -> None:
    dora = {"target_modules": ["q_proj"], "use_dora": True}
    train(llama, CASES["IA3"][1]() if case == "IA3" else peft.LoraConfig(r=2, **dora), tmp_path)
    words = ["--lora_model_path", tmp_path / "adapter", "--base_model_path", tmp_path / "base"]
    said = merge(*words, "--output_path", tmp_path / "out")
    changed = {"IA3": 6, "DoRA": 2}[case]
    assert f"merged {changed} tensors, copied {21 - changed} in" in said.out
