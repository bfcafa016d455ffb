"""Adapters of other kinds than LoRA on Linear layers, as PEFT makes and merges them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Said, array, make_model, read_model, save_file

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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("task", "kind"), [
    ("SEQ_CLS", "LlamaForSequenceClassification"), ("TOKEN_CLS", "LlamaForTokenClassification"),
])  # fmt: skip
def test_the_head_of_a_task_over_a_language_model(tmp_path: Path, task: str, kind: str, tied: bool) -> None:
    """The output's config.json says class and labels, so that it loads without being told."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**DIMS, tie_word_embeddings=tied, pad_token_id=0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    cls = getattr(transformers, kind)
    model = cls.from_pretrained(tmp_path / "base", num_labels=3)
    trained = peft.get_peft_model(model, peft.LoraConfig(task_type=task, r=2, target_modules=["q_proj"])).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    trained.save_pretrained(tmp_path / "adapter")
    modelfuse.merge(
        lora_model_path=tmp_path / "adapter", base_model_path=tmp_path / "base", output_path=tmp_path / "out"
    )
    assert modelfuse.verify(tmp_path / "out", full=True).holds
    made, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["architectures"] == [kind]
    assert len(content["id2label"]) == 3
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        want, got = trained(input_ids=ids).logits, made.eval()(input_ids=ids).logits
    np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=0, atol=1e-6)


def test_whole_matrices_with_rows_for_added_tokens(tmp_path: Path, refuse: Callable[..., str]) -> None:
    torch.manual_seed(0)
    cls, config = llama()
    cls(config).save_pretrained(tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(51, mean_resizing=False)
    settings: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]}
    both = peft.LoraConfig(**settings, modules_to_save=["embed_tokens", "lm_head"])
    trained = peft.get_peft_model(model, both).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    trained.save_pretrained(tmp_path / "adapter")
    words: dict[str, Any] = {"lora_model_path": tmp_path / "adapter", "base_model_path": tmp_path / "base"}
    modelfuse.merge(**words, output_path=tmp_path / "out")
    assert modelfuse.verify(tmp_path / "out", full=True).holds
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 51
    ids = torch.tensor([[1, 50, 49, 2]])
    with torch.no_grad():
        want, got = trained(input_ids=ids).logits, cls.from_pretrained(tmp_path / "out").eval()(input_ids=ids).logits
    np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=0, atol=1e-6)
    from safetensors.numpy import load_file

    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(file, {name: each for name, each in load_file(file).items() if "lm_head" not in name})
    refuse("check", "--lora_model_path", tmp_path / "adapter", "--base_model_path", tmp_path / "base",
           says=["has other rows for tokens than its base", "lm_head.weight has 48"], hint="resize")  # fmt: skip


#: Adapters of a model with added rows, whether both ends are saved with them.
GROWN: dict[str, dict[str, Any]] = {
    "LoRA on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "DoRA on both": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "trained rows": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [48, 49, 50]}},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", GROWN)
def test_adapters_of_embeddings_with_added_rows(
    tmp_path: Path, refuse: Callable[..., str], kind: str, tied: bool
) -> None:
    """PEFT saves the matrices that it was trained on beside the factors; without them their rows cannot be known."""
    torch.manual_seed(0)
    cls, config = llama()
    config.tie_word_embeddings = tied
    cls(config).save_pretrained(tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(51, mean_resizing=False)
    trained = peft.get_peft_model(model, peft.LoraConfig(r=2, **GROWN[kind])).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    trained.save_pretrained(tmp_path / "adapter")
    words = ("--lora_model_path", tmp_path / "adapter", "--base_model_path", tmp_path / "base")
    if kind == "LoRA on the embedding" and not tied:  # PEFT leaves out the head, whose rows are new, too.
        refuse("check", *words, says=["lm_head.weight has 48"], hint="resize_token_embeddings")
        return
    modelfuse.merge(lora_model_path=words[1], base_model_path=words[3], output_path=tmp_path / "out")
    assert modelfuse.verify(tmp_path / "out", full=True).holds
    ids = torch.tensor([[1, 50, 49, 2]])
    made, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        want, got = trained(input_ids=ids).logits, made.eval()(input_ids=ids).logits
    np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=0, atol=1e-6)
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    refuse("check", *words, says=["cannot go into"], hint="save_embedding_layers=True")


@pytest.mark.parametrize("base_is", ["paddle", "one tensor", "apart"])
def test_paddle_s_lora_of_experts(tmp_path: Path, base_is: str) -> None:
    """``experts.gate_up_proj_lora_A`` [experts, in, r] and ``_lora_B`` [experts, r, out], in any layout of the base."""
    random = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    experts, hidden, inner, rank = 3, 4, 5, 2
    layer = "model.layers.0.mlp.experts"
    weights = {"gate_up_proj": noise(experts, hidden, 2 * inner), "down_proj": noise(experts, inner, hidden)}
    factors: dict[str, np.ndarray] = {}
    deltas: dict[str, np.ndarray] = {}
    for name, each in weights.items():
        a, b = noise(experts, each.shape[1], rank), noise(experts, rank, each.shape[2])
        factors |= {f"{layer}.{name}_lora_A": a, f"{layer}.{name}_lora_B": b}
        deltas[name] = 1.5 * (a @ b)
    own = {f"{layer}.{name}": each for name, each in weights.items()}
    changed = {f"{layer}.{name}": weights[name] + deltas[name] for name in weights}
    config: dict[str, object] = {"model_type": "qwen3_moe"}
    if base_is == "paddle":
        config["source"] = "paddle"
    else:
        own, changed = ({name: np.ascontiguousarray(each.transpose(0, 2, 1)) for name, each in group.items()}
                        for group in (own, changed))  # fmt: skip
    if base_is == "apart":
        own, changed = (_apart(group, layer) for group in (own, changed))
    make_model(tmp_path / "base", own | {"model.norm.weight": noise(hidden)}, config=config)
    (tmp_path / "adapter").mkdir()
    save_file(tmp_path / "adapter" / "peft_model.safetensors", factors, {"format": "np"})
    (tmp_path / "adapter" / "lora_config.json").write_text(json.dumps({"r": rank, "lora_alpha": 3}))
    modelfuse.merge(
        lora_model_path=tmp_path / "adapter", base_model_path=tmp_path / "base", output_path=tmp_path / "out"
    )
    got = read_model(tmp_path / "out")
    for name, want in changed.items():
        np.testing.assert_allclose(array(got[name]), want, rtol=0, atol=2e-6, err_msg=name)


def _apart(tensors: dict[str, np.ndarray], layer: str) -> dict[str, np.ndarray]:
    gate_up, down = tensors[f"{layer}.gate_up_proj"], tensors[f"{layer}.down_proj"]
    inner, found = gate_up.shape[1] // 2, dict[str, np.ndarray]()
    for number, (both, last) in enumerate(zip(gate_up, down, strict=True)):
        parts = {"gate_proj": both[:inner], "up_proj": both[inner:], "down_proj": last}
        found |= {f"{layer}.{number}.{name}.weight": np.ascontiguousarray(each) for name, each in parts.items()}
    return found


def test_an_adapter_names_its_own_base(tmp_path: Path, refuse: Callable[..., str]) -> None:
    train(llama, CASES["LoHa"][1](), tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"base_model_name_or_path": "org/model"}))
    refuse("check", "--lora_model_path", tmp_path / "adapter",
           says=["lora_model_path needs base_model_path", "was trained on org/model"],
           hint="--base_model_path org/model")  # fmt: skip
    file.write_text(json.dumps(content | {"base_model_name_or_path": str(tmp_path / "base")}))
    plan = modelfuse.check(lora_model_path=tmp_path / "adapter")
    assert plan.recipe.base_model_path == tmp_path / "base"
