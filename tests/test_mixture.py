"""Mixtures of experts made of dense models: loaded by transformers, and run against programs written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import Said, array, make_model, read_model

import modelfuse as package
from modelfuse.kernels.normal_draws import normals
from modelfuse.methods.random import SCALE, draws

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

Run = Callable[..., Said]
Tensors = dict[str, np.ndarray]
WIDTH, INNER, LAYERS, HEADS, WORDS = 8, 12, 2, 2, 12
TOKENS = ["<unk>", "<s>", "</s>", *"abcdefghi"]
SIZES = {"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
         "num_attention_heads": HEADS, "num_key_value_heads": 1, "max_position_embeddings": 64, "hidden_act": "silu",
         "rms_norm_eps": 1e-6, "rope_theta": 5000.0, "tie_word_embeddings": False,
         "torch_dtype": "float32"}  # fmt: skip
CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
           "qwen3": "Qwen3ForCausalLM"}  # fmt: skip
SPECIAL = {"id": 1, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
           "special": True}  # fmt: skip
TOKENIZER: dict[str, Any] = {
    "version": "1.0", "added_tokens": [SPECIAL], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None, "decoder": None, "truncation": None, "padding": None,
    "model": {"type": "WordLevel", "vocab": {word: number for number, word in enumerate(TOKENS)}, "unk_token": "<unk>"},
}  # fmt: skip


def dense(kind: str, seed: int, inner: int = INNER) -> Tensors:
    """The tensors of a tiny dense model."""
    draw, head = np.random.default_rng(seed), WIDTH // HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, WIDTH)}
    for layer in range(LAYERS):
        own = f"model.layers.{layer}."
        shapes |= {f"{own}input_layernorm.weight": (WIDTH,), f"{own}post_attention_layernorm.weight": (WIDTH,)}
        for each, rows in (("q", WIDTH), ("k", head), ("v", head)):
            shapes[f"{own}self_attn.{each}_proj.weight"] = (rows, WIDTH)
            if kind == "qwen2":
                shapes[f"{own}self_attn.{each}_proj.bias"] = (rows,)
        shapes[f"{own}self_attn.o_proj.weight"] = (WIDTH, WIDTH)
        if kind == "qwen3":
            shapes |= {f"{own}self_attn.{each}_norm.weight": (head,) for each in "qk"}
        shapes |= {f"{own}mlp.gate_proj.weight": (inner, WIDTH), f"{own}mlp.up_proj.weight": (inner, WIDTH),
                   f"{own}mlp.down_proj.weight": (WIDTH, inner)}  # fmt: skip
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (WORDS, WIDTH)}
    return {name: draw.standard_normal(shape).astype(np.float32) * 0.5 for name, shape in shapes.items()}


def make(folder: Path, kind: str, seed: int, **more: Any) -> Tensors:
    tensors = dense(kind, seed, **more)
    config = {"model_type": kind, "architectures": [CLASSES[kind]], **SIZES}
    if kind == "qwen3":
        config["head_dim"] = WIDTH // HEADS
    files = {"tokenizer.json": json.dumps(TOKENIZER), "tokenizer_config.json": json.dumps({"bos_token": "<s>"})}
    make_model(folder, tensors, config=config, files=files)
    return tensors


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Tensors]]:
    """Makes dense models of one kind in the working directory: ``base``, ``a``, ``b`` and ``c``."""
    monkeypatch.chdir(tmp_path)
    return lambda kind: {name: make(tmp_path / name, kind, seed) for seed, name in enumerate(("base", "a", "b", "c"))}


def expert(name: str, *prompts: str, **more: Any) -> dict[str, Any]:
    return {"source_model": name, **({"positive_prompts": list(prompts)} if prompts else {}), **more}


def two(**more: Any) -> dict[str, Any]:
    return {"base_model": "base", "gate_mode": "cheap_embed",
            "experts": [expert("a", "a b c"), expert("b", "d e", "f", negative_prompts=["g"])], **more}  # fmt: skip


@pytest.fixture
def mix(modelfuse: Run, tmp_path: Path) -> Callable[..., Tensors]:
    """Makes a mixture in ``out``; its tensors."""

    def run(content: Mapping[str, Any], *words: object) -> Tensors:
        (tmp_path / "experts.yml").write_text(yaml.safe_dump(dict(content), sort_keys=False))
        said = modelfuse("moe", "experts.yml", "--output_path", "out", "--overwrite", *words)
        assert said.status == 0, said.err
        return {name: array(each) for name, each in read_model(tmp_path / "out").items()}

    return run


def norm(x: Any, weight: Any) -> Any:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + SIZES["rms_norm_eps"]) * weight


def attention(x: Any, own: Mapping[str, Any]) -> Any:
    """Causal attention with rotary positions, two heads and one of keys and values."""

    def projected(each: str) -> Any:
        found = x @ own[f"{each}_proj.weight"].T + own.get(f"{each}_proj.bias", 0)
        found = found.reshape(len(x), -1, WIDTH // HEADS)
        return norm(found, own[f"{each}_norm.weight"]) if f"{each}_norm.weight" in own else found

    half = WIDTH // HEADS // 2
    angles = torch.arange(len(x))[:, None] / 5000.0 ** (torch.arange(half) / half)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def turned(parts: Any) -> Any:
        z = torch.complex(parts[..., :half], parts[..., half:]) * turns
        return torch.cat([z.real, z.imag], -1)

    queries, keys, values = turned(projected("q")), turned(projected("k")), projected("v")
    scores = torch.einsum("thd,sgd->hts", queries, keys) / (WIDTH // HEADS) ** 0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    return torch.einsum("hts,sgd->thd", scores.softmax(-1), values).reshape(len(x), -1) @ own["o_proj.weight"].T


def mlp(x: Any, tensors: Mapping[str, Any], layer: int, scale: float = 1.0) -> Any:
    gate, up, down = (tensors[f"model.layers.{layer}.mlp.{each}_proj.weight"] for each in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T * scale


def by_hand(
    base: Tensors, experts: list[Tensors], gates: list[Any], tokens: list[int], shared: Any = None, per_token: int = 2
) -> Any:
    """Logits of a mixture, written down from the formulas."""
    own = {name: torch.from_numpy(each) for name, each in base.items()}
    others = [{name: torch.from_numpy(each) for name, each in tensors.items()} for tensors in experts]
    x = own["model.embed_tokens.weight"][tokens]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        inside = {name.removeprefix(prefix + "self_attn."): each for name, each in own.items() if prefix in name}
        x = x + attention(norm(x, own[f"{prefix}input_layernorm.weight"]), inside)
        y = norm(x, own[f"{prefix}post_attention_layernorm.weight"])
        weights, chosen = (y @ torch.tensor(gates[layer]).T).softmax(-1).topk(per_token)
        weights = weights / weights.sum(-1, keepdim=True)
        results = torch.stack([mlp(y, each, layer) for each in others], 1)
        x = x + torch.einsum("tk,tkw->tw", weights, results[torch.arange(len(y))[:, None], chosen])
        if shared is not None:
            x = x + shared(y, layer)
    return norm(x, own["model.norm.weight"]) @ own["lm_head.weight"].T


def loaded(folder: Path) -> Any:
    """A model of transformers', all of whose tensors are in the files, and nothing else."""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]
    return model.eval()


PROMPT = [1, 4, 6, 3, 9]


@pytest.mark.parametrize(
    ("kind", "shared", "block"),
    [("llama", False, "block_sparse_moe"), ("mistral", False, "block_sparse_moe"), ("qwen3", False, "mlp"),
     ("qwen2", True, "mlp"), ("llama", True, "mlp")],
)  # fmt: skip
def test_transformers_computes_what_was_asked_for(
    models: Any, mix: Any, tmp_path: Path, kind: str, shared: bool, block: str
) -> None:
    made = models(kind)
    more: dict[str, Any] = {"shared_experts": [expert("c", "h i", residual_scale=0.25)]} if shared else {}
    content = two(**more, experts_per_token=2)
    content["experts"].append(expert("base", "i"))
    found = mix(content, *(["--max_shard_size", "2000"] if shared else []))
    gates = [found[f"model.layers.{layer}.{block}.gate.weight"] for layer in range(LAYERS)]
    assert package.verify(tmp_path / "out", full=True).holds
    model = loaded(tmp_path / "out")

    def through_shared(y: Any, layer: int) -> Any:
        own = {name: torch.from_numpy(each) for name, each in made["c"].items()}
        gate = torch.tensor(found[f"model.layers.{layer}.mlp.shared_expert_gate.weight"])
        return (y @ gate.T).sigmoid() * mlp(y, own, layer, 0.25)

    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT])).logits[0]
        expected = by_hand(made["base"], [made[name] for name in ("a", "b", "base")], gates, PROMPT,
                           through_shared if shared else None)  # fmt: skip
    np.testing.assert_allclose(logits.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)


def unit(vector: Any) -> Any:
    return vector / np.linalg.norm(vector)


def test_embeddings_of_prompts_make_the_router(models: Any, mix: Any) -> None:
    embedding = models("llama")["base"]["model.embed_tokens.weight"]
    found = mix(two())

    def row(*prompts: str) -> Any:
        return unit(sum(embedding[1] + sum(embedding[TOKENS.index(word)] for word in each.split()) for each in prompts))

    for layer in range(LAYERS):
        gate = found[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        np.testing.assert_allclose(gate, [row("a b c"), unit(row("d e", "f") - row("g"))], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "hidden_last"])
def test_states_of_prompts_make_the_router(models: Any, mix: Any, tmp_path: Path, mode: str) -> None:
    models("llama")
    found = mix(two(gate_mode=mode))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)

    def states(*prompts: str) -> Any:
        total: Any = 0
        for prompt in prompts:
            tokens = [1, *(TOKENS.index(word) for word in prompt.split())]
            hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
            total = total + np.stack([
                (each[0].double().mean(0) if mode == "hidden_avg" else each[0, -1].double()).detach().numpy()
                for each in hidden[:LAYERS]
            ])  # fmt: skip
        return total / len(prompts)

    with torch.inference_mode():
        one, other = states("a b c"), states("d e", "f") - states("g")
    for layer in range(LAYERS):
        gate = found[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        np.testing.assert_allclose(gate, [unit(one[layer]), unit(other[layer])], rtol=1e-5, atol=1e-6)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["tensors"]["model.layers.0.block_sparse_moe.gate.weight"]["made"] == mode
    assert package.verify(tmp_path / "out", full=True).holds


def test_random_routers_are_repeated_by_their_seed(models: Any, mix: Any) -> None:
    models("llama")
    name = "model.layers.1.block_sparse_moe.gate.weight"
    experts = [expert(each) for each in "abcabc"]
    once, again, other = (
        mix({"base_model": "base", "gate_mode": "random", "experts": experts}, "--seed", seed)[name]
        for seed in (1, 1, 2)
    )
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)
    assert 0.6 < once.std() < 1.4
    uniform = mix({"base_model": "base", "gate_mode": "uniform_random", "experts": experts})[name]
    assert 0.8 * WIDTH**-0.5 < abs(uniform).max() <= WIDTH**-0.5
    assert abs(uniform.mean()) < 0.1


def test_normal_draws_are_the_inverse_of_uniform_ones() -> None:
    uniform = draws(5, 0, 20000).astype(np.float64) + SCALE / 2
    expected = [NormalDist().inv_cdf(each) for each in uniform]
    np.testing.assert_allclose(normals(5, 0, 20000), expected, atol=1e-6)


def test_noise_and_scales(models: Any, mix: Any, tmp_path: Path) -> None:
    made = models("llama")
    experts = [expert("a", noise_scale=0.5), expert("b", residual_scale=0.25)]
    found = mix({"base_model": "base", "gate_mode": "random", "experts": experts, "dtype": "float32"})
    block, mlps = "model.layers.0.block_sparse_moe.experts.", "model.layers.0.mlp."
    noise = np.concatenate([
        (found[f"{block}0.{new}.weight"] - made["a"][f"{mlps}{old}_proj.weight"]).ravel()
        for new, old in (("w1", "gate"), ("w2", "down"), ("w3", "up"))
    ])  # fmt: skip
    assert 0.4 < noise.std() < 0.6
    assert np.unique(noise.round(4)).size > 250  # No two tensors have the same noise.
    assert np.array_equal(found[f"{block}1.w1.weight"], made["b"][f"{mlps}gate_proj.weight"])
    assert np.array_equal(found[f"{block}1.w2.weight"], made["b"][f"{mlps}down_proj.weight"] * np.float32(0.25))
    assert package.verify(tmp_path / "out", full=True).holds


def test_a_deepseek_model(models: Any, mix: Any, tmp_path: Path) -> None:
    made = models("llama")
    found = mix(two(shared_experts=[expert("c", residual_scale=0.5)], architecture="deepseek"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    told = {"model_type": "deepseek", "n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 2,
            "moe_intermediate_size": INNER, "first_k_dense_replace": 0, "norm_topk_prob": True}  # fmt: skip
    assert {key: config[key] for key in told} == told
    own, mlps = "model.layers.1.mlp.", ("gate_proj", "up_proj", "down_proj")
    expected = {f"{own}experts.{number}.{part}.weight": made[name][f"{own}{part}.weight"]
                for number, name in enumerate("ab") for part in mlps}  # fmt: skip
    expected |= {f"{own}shared_experts.{part}.weight": made["c"][f"{own}{part}.weight"] * (0.5 if "down" in part else 1)
                 for part in mlps}  # fmt: skip
    assert {name for name in found if own in name} == {*expected, f"{own}gate.weight"}
    assert all(np.array_equal(found[name], each) for name, each in expected.items())
    assert np.array_equal(found["model.layers.1.self_attn.q_proj.weight"],
                          made["base"]["model.layers.1.self_attn.q_proj.weight"])  # fmt: skip


def test_a_base_without_biases_gets_zeros_where_there_must_be_some(models: Any, mix: Any) -> None:
    models("llama")
    found = mix(two(shared_experts=[expert("c", "h")], architecture="qwen"))
    biases = {name: each for name, each in found.items() if name.endswith("bias")}
    assert len(biases) == 3 * LAYERS
    assert not any(each.any() for each in biases.values())


def test_every_tensor_is_accounted_for(models: Any, mix: Any, tmp_path: Path) -> None:
    made = models("llama")
    mix(two(dtype="bfloat16"))
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    for number, name in enumerate(("base", "a", "b")):
        entry = report["inputs"][number]
        left = {tensor for each in entry["left_out"] for tensor in each["tensors"]}
        assert left == {each for each in made[name] if ("mlp" in each) == (name == "base")}
    assert {each["dtype"] for each in report["tensors"].values()} == {"BF16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert yaml.safe_load((tmp_path / "out" / "mergekit_moe_config.yml").read_text())["gate_mode"] == "cheap_embed"


def test_the_record_and_mergekits_command_give_the_same_bytes(models: Any, modelfuse: Run, mix: Any) -> None:
    models("llama")
    mix(two())
    weights = Path("out/model.safetensors").read_bytes()
    assert modelfuse("merge", "out/merge_config.json", "--output_path", "again").status == 0
    assert Path("again/model.safetensors").read_bytes() == weights
    said = modelfuse("mergekit-moe", "experts.yml", "third", "--load-in-4bit", "--random-seed", 0)
    assert said.status == 0, said.err
    assert "--load-in-4bit has no effect here" in said.err
    assert Path("third/model.safetensors").read_bytes() == weights
    said = modelfuse("check", "experts.yml")
    assert "a mixtral model with 2 experts" in " ".join(said.out.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate_mode": "hiden"}, "gate_mode is 'hiden'"),
        ({"experts": []}, "experts is empty"),
        ({"experts": [expert("a", "a")]}, "experts_per_token is 2, but there are 1 experts"),
        ({"experts": [expert("a"), expert("b", "b")]}, "experts[0] has no positive_prompts"),
        ({"experts": [expert("a", "x"), expert("b", "x")]}, "the router cannot distinguish them"),
        ({"experts": [expert("a", "x"), expert("a", "y")]}, "All experts are a, so they all compute the same"),
        ({"experts": [expert("a", "x", noise_scale=-1), expert("b")]}, "experts[0].noise_scale is -1"),
        ({"experts": [expert("a", "x", residual_scale="much"), expert("b")]}, "experts[0].residual_scale is 'much'"),
        ({"experts": [{"model": "a"}]}, "experts[0] names no model"),
        ({"architecture": "mixtrl"}, "architecture is 'mixtrl'"),
        ({"architecture": "qwen3"}, "its base must be a qwen3"),
        ({"architecture": "mixtral", "shared_experts": [expert("c")]}, "it cannot have a shared expert"),
        ({"shared_experts": [expert("c"), expert("a")]}, "it can have only one shared expert"),
        ({"architecture": "qwen", "shared_experts": [expert("c")]}, "shared_experts[0] has no positive_prompts"),
        ({"dtype": "bf16"}, "Write bfloat16"),
        ({"base_model": None}, "base_model is not given"),
        ({"experts": [expert("wide", "x"), expert("b", "y")]}, "has the shape"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    models: Any, modelfuse: Run, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    models("llama")
    make(tmp_path / "wide", "llama", 9, inner=16)
    (tmp_path / "experts.yml").write_text(yaml.safe_dump({**two(), **changes}))
    said = modelfuse("moe", "experts.yml", "--output_path", "out")
    assert said.status == 2
    assert message in " ".join(said.err.split())
    assert not (tmp_path / "out").exists()


def test_a_library_that_is_missing_is_named(
    models: Any, modelfuse: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models("llama")
    (tmp_path / "experts.yml").write_text(yaml.safe_dump(two(gate_mode="hidden")))
    monkeypatch.setattr("modelfuse.planning.optional_packages.find_spec", lambda name: None)
    said = modelfuse("moe", "experts.yml", "--output_path", "out")
    assert said.status == 2
    assert "gate_mode hidden needs tokenizers, which is not installed" in " ".join(said.err.split())


def test_moe_takes_experts_only(modelfuse: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n")
    said = modelfuse("moe", tmp_path / "c.yml", "--output_path", tmp_path / "out")
    assert said.status == 2
    assert "moe needs a configuration with experts:" in said.err


PEER = json.loads((Path(__file__).parent / "fixtures" / "peers" / "arcee_moe.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PEER)
def test_routers_and_configurations_are_mergekits(models: Any, mix: Any, tmp_path: Path, name: str) -> None:
    """As mergekit-moe 0.1.5 has made them; prompts' states are of bfloat16 there, as here."""
    case = PEER[name]
    models(case["kind"])
    found, block = mix(case["configuration"]), "mlp" if case["kind"] == "qwen3" else "block_sparse_moe"
    for layer, gate in enumerate(case["gates"]):
        ours = found[f"model.layers.{layer}.{block}.gate.weight"]
        np.testing.assert_allclose(ours, gate, atol=0.02 if "hidden" in name else 1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["num_local_experts"] = config.get("num_local_experts", config.get("num_experts"))
    config.setdefault("head_dim", WIDTH // HEADS)
    assert {key: config[key] for key in case["config"]} == case["config"]


def test_an_expert_may_be_a_model_with_an_adapter(models: Any, modelfuse: Run, mix: Any, tmp_path: Path) -> None:
    made = models("llama")
    said = modelfuse("extract-lora", "--model", "a", "--base_model", "base", "--output_path", "lora")
    assert said.status == 0, said.err
    found = mix(two(experts=[expert("base+lora", "a"), expert("b", "d")]))
    for new, old in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        ours = found[f"model.layers.1.block_sparse_moe.experts.0.{new}.weight"]
        np.testing.assert_allclose(ours, made["a"][f"model.layers.1.mlp.{old}_proj.weight"], atol=1e-5)
    query = "model.layers.1.self_attn.q_proj.weight"
    assert np.array_equal(found[query], made["base"][query])
    assert package.verify(tmp_path / "out", full=True).holds
    found = mix(two(base_model="base+lora"))
    np.testing.assert_allclose(found[query], made["a"][query], atol=1e-5)
