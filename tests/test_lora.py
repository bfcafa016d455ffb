"""Adapters merged into their base: kinds, names, layouts, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapting import CONFIG, DOWN, SHAPES, UP, Q, adapter_of, factors, lora, make_base, make_paddle, make_peft, noise
from conftest import Said, Stored, array, make_model, read_model
from definitions import applied, merge_tensor

import modelfuse
from modelfuse.checkpoints import open_checkpoint
from modelfuse.checkpoints.adapters.arrays import load
from modelfuse.kernels.compiled.low_rank import add_low_rank, low_rank

Refuse = Callable[..., str]
FIXTURES = Path(__file__).parent / "fixtures" / "lora"
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 2e-6}


def merged(tmp_path: Path, **settings: Any) -> dict[str, Stored]:
    """The output's tensors; the output verifies whole, and more workers and less memory give the same bytes."""
    out = tmp_path / "out"
    modelfuse.merge(output_path=out, overwrite=True, **settings)
    found = modelfuse.verify(out, full=True)
    assert found.holds, found.problems
    other = tmp_path / "again"
    modelfuse.merge(output_path=other, overwrite=True, **{"n_process": 3, "memory": 1, **settings})
    assert read_model(other) == read_model(out)
    return read_model(out)


def check(got: dict[str, Stored], base: dict[str, np.ndarray], changed: dict[str, np.ndarray]) -> None:
    """What is changed is as it should be, all else the base's to the bit."""
    assert got.keys() == base.keys()
    for name, tensor in base.items():
        if name in changed:
            np.testing.assert_allclose(array(got[name]), changed[name], **CLOSE, err_msg=name)
            assert not np.array_equal(array(got[name]), tensor)
        else:
            assert got[name] == Stored.of(tensor), name


@pytest.mark.parametrize("rank", [1, 3, 4, 9, 16])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_any_run_of_a_product_has_the_bits_of_the_definition(rank: int, dtype: str) -> None:
    left, right = noise(1, (7, rank)).astype(dtype), noise(2, (rank, 2500)).astype(dtype)
    whole = low_rank(left, right, 0.37).ravel()
    for first, count in ((0, 17500), (7, 17000), (2499, 2), (100, 1400), (5001, 1), (2500, 5000)):
        out = np.zeros(count, dtype)
        add_low_rank(left, right, out.dtype.type(0.37), first, out)
        assert out.tobytes() == whole[first : first + count].tobytes()


@pytest.mark.parametrize("scaled", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 4}},
                                    {"alpha_pattern": {"mlp.up_proj": 7, ".*_proj": 5}}])  # fmt: skip
def test_scale_by_alpha_and_rank(tmp_path: Path, scaled: dict[str, Any]) -> None:
    base, tensors = make_base(tmp_path / "base")
    rank = scaled.get("rank_pattern", {}).get("q_proj", 2)
    (qa, qb), (ua, ub) = factors(1, 16, 8, rank), factors(2, 10, 8)
    adapter = make_peft(tmp_path / "L", lora(Q, qa, qb) | lora(UP, ua, ub), **scaled)
    root = scaled.get("use_rslora", False)
    q_alpha, up_alpha = (5, 7) if "alpha_pattern" in scaled else (3, 3)
    changed = {
        f"{Q}.weight": tensors[f"{Q}.weight"] + q_alpha / (math.sqrt(rank) if root else rank) * (qb @ qa),
        f"{UP}.weight": tensors[f"{UP}.weight"] + up_alpha / (math.sqrt(2) if root else 2) * (ub @ ua),
    }
    check(merged(tmp_path, lora_model_path=adapter, base_model_path=base), tensors, changed)


def test_the_command_line_of_paddles_tool(tmp_path: Path, merge: Callable[..., Said]) -> None:
    base, tensors = make_base(tmp_path / "base")
    adapter, deltas = adapter_of(tmp_path / "L", 1, Q, DOWN)
    merge("--lora_model_path", adapter, "--base_model_path", base, "--output_path", tmp_path / "C")
    check(read_model(tmp_path / "C"), tensors, {name: tensors[name] + delta for name, delta in deltas.items()})
    config = tmp_path / "C" / "merge_config.json"
    merge(config, "--output_path", tmp_path / "D", "--n_process", 2)
    assert read_model(tmp_path / "C") == read_model(tmp_path / "D")


def test_the_report_accounts_for_every_tensor_of_an_adapter(tmp_path: Path) -> None:
    base, _ = make_base(tmp_path / "base")
    adapter, _ = adapter_of(tmp_path / "L", 1, Q)
    modelfuse.merge(lora_model_path=adapter, base_model_path=base, output_path=tmp_path / "C")
    report = json.loads((tmp_path / "C" / "merge_report.json").read_text())
    entry = report["inputs"][0]
    assert (entry["role"], entry["format"], entry["tensors"]) == ("adapter", "peft adapter", 2)
    assert entry["went_into"] == {f"base_model.model.{Q}.lora_{part}.weight": [f"{Q}.weight"] for part in "AB"}
    assert sorted(entry["files"]) == ["adapter_config.json", "adapter_model.safetensors"]
    actions = {name: tensor["action"] for name, tensor in report["tensors"].items()}
    assert actions == {name: "merged" if name == f"{Q}.weight" else "taken" for name in SHAPES}


def test_an_input_that_was_changed_is_told(tmp_path: Path) -> None:
    base, _ = make_base(tmp_path / "base")
    adapter, _ = adapter_of(tmp_path / "L", 1, Q)
    modelfuse.merge(lora_model_path=adapter, base_model_path=base, output_path=tmp_path / "C")
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 3', '"lora_alpha": 4'))
    found = modelfuse.verify(tmp_path / "C", full=True)
    assert [problem.kind for problem in found.problems] == ["bytes", "inputs"]


def test_bfloat16_is_rounded_once_and_kept_everywhere(tmp_path: Path) -> None:
    shapes = {f"{Q}.weight": (16, 8), "model.norm.weight": (8,)}
    tensors = {name: noise(seed, shape) for seed, (name, shape) in enumerate(shapes.items())}
    halves = {name: Stored("BF16", each.shape, _halves(each)) for name, each in tensors.items()}
    base = make_model(tmp_path / "base", halves, config=CONFIG)
    adapter, deltas = adapter_of(tmp_path / "L", 1, Q)
    got = merged(tmp_path, lora_model_path=adapter, base_model_path=base)
    assert {each.dtype for each in got.values()} == {"BF16"}
    exact = array(halves[f"{Q}.weight"]) + deltas[f"{Q}.weight"]
    np.testing.assert_allclose(array(got[f"{Q}.weight"]), exact, rtol=2.0**-8, atol=0)


def test_a_pdparams_base_of_bfloat16_keeps_its_type(tmp_path: Path) -> None:
    paddle = pytest.importorskip("paddle", reason="writes .pdparams with Paddle")
    shapes = {f"{Q}.weight": (16, 8), "model.norm.weight": (8,)}
    state = {name: paddle.to_tensor(noise(1, shape)).astype("bfloat16") for name, shape in shapes.items()}
    base = tmp_path / "base"
    base.mkdir()
    paddle.save(state, str(base / "model_state.pdparams"))
    (base / "config.json").write_text(json.dumps(CONFIG))
    adapter, deltas = adapter_of(tmp_path / "L", 1, Q)
    got = merged(tmp_path, lora_model_path=adapter, base_model_path=base)
    assert {each.dtype for each in got.values()} == {"BF16"}
    weight = state[f"{Q}.weight"].astype("float32").numpy() + deltas[f"{Q}.weight"]
    np.testing.assert_allclose(array(got[f"{Q}.weight"]), weight, rtol=2.0**-8, atol=0)
    plain = merged(tmp_path, model_path_list=[base, base], base_model_path=base)
    assert {each.dtype for each in plain.values()} == {"BF16"}


def _halves(values: np.ndarray) -> bytes:
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def test_embeddings_and_the_copy_that_peft_keeps(tmp_path: Path, refuse: Refuse) -> None:
    base, tensors = make_base(tmp_path / "base")
    name = "model.embed_tokens"
    a, b = noise(1, (2, 13)), noise(2, (8, 2))
    own = {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
    copy = {f"{name}.base_layer.weight": tensors[f"{name}.weight"]}
    adapter = make_peft(tmp_path / "L", own | copy)
    changed = {f"{name}.weight": tensors[f"{name}.weight"] + np.float32(1.5) * (b @ a).T}
    check(merged(tmp_path, lora_model_path=adapter, base_model_path=base), tensors, changed)
    wide = {f"{name}.base_layer.weight": tensors[f"{name}.weight"].astype(np.float64)}
    check(
        merged(tmp_path, lora_model_path=make_peft(tmp_path / "W", own | wide), base_model_path=base), tensors, changed
    )
    other = make_peft(tmp_path / "X", own | {f"{name}.base_layer.weight": tensors[f"{name}.weight"] + 1})
    words = ["--lora_model_path", other, "--base_model_path", base, "--output_path", tmp_path / "C"]
    refuse("merge", *words, says=["embed_tokens", other], hint="trained on")


def test_dora_by_definition(tmp_path: Path) -> None:
    base, tensors = make_base(tmp_path / "base")
    a, b = factors(1, 16, 8)
    magnitude = np.abs(noise(3, (16,))) + 1
    ea, eb, em = noise(5, (2, 13)), noise(6, (8, 2)), np.abs(noise(7, (8,))) + 1
    name = "model.embed_tokens"
    adapter = make_peft(
        tmp_path / "L",
        lora(Q, a, b) | {f"{Q}.lora_magnitude_vector": magnitude, f"{name}.lora_embedding_A": ea,
                         f"{name}.lora_embedding_B": eb, f"{name}.lora_magnitude_vector": em},
        use_dora=True,
    )  # fmt: skip
    whole = tensors[f"{Q}.weight"] + np.float32(1.5) * (b @ a)
    table = tensors[f"{name}.weight"] + np.float32(1.5) * (eb @ ea).T
    changed = {
        f"{Q}.weight": whole * (magnitude / np.linalg.norm(whole, axis=1))[:, None],
        f"{name}.weight": table * (em / np.linalg.norm(table, axis=0)),
    }
    check(merged(tmp_path, lora_model_path=adapter, base_model_path=base), tensors, changed)


def test_whole_tensors_replace_the_base_s_to_the_bit(tmp_path: Path) -> None:
    base, _ = make_base(tmp_path / "base")
    a, b = factors(1, 16, 8)
    head, norm = noise(8, (13, 8)), noise(9, (8,))
    saved = {"lm_head.modules_to_save.weight": head, "model.norm.weight": norm}
    adapter = make_peft(tmp_path / "L", lora(Q, a, b) | saved, modules_to_save=["lm_head", "norm"])
    got = merged(tmp_path, lora_model_path=adapter, base_model_path=base)
    assert got["lm_head.weight"] == Stored.of(head)
    assert got["model.norm.weight"] == Stored.of(norm)


def test_biases_of_b_and_trained_ones(tmp_path: Path) -> None:
    base, tensors = make_base(tmp_path / "base")
    a, b = factors(1, 16, 8)
    bias = noise(4, (16,))
    of_b = make_peft(tmp_path / "L", lora(Q, a, b) | {f"{Q}.lora_B.bias": bias}, lora_bias=True)
    got = merged(tmp_path, lora_model_path=of_b, base_model_path=base)
    np.testing.assert_allclose(array(got[f"{Q}.bias"]), tensors[f"{Q}.bias"] + np.float32(1.5) * bias, **CLOSE)
    trained = make_peft(tmp_path / "T", lora(Q, a, b) | {f"{Q}.base_layer.bias": bias}, bias="all")
    assert merged(tmp_path, lora_model_path=trained, base_model_path=base)[f"{Q}.bias"] == Stored.of(bias)


def test_conv1d_and_conv2d(tmp_path: Path) -> None:
    """GPT-2 stores [in, out], and names begin otherwise in the model; a convolution's A is four-dimensional."""
    shapes = {"h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_proj.weight": (8, 8), "conv.weight": (6, 4, 3, 3)}
    base, tensors = make_base(tmp_path / "base", shapes=shapes, config={"model_type": "gpt2"})
    (ca, cb), (pa, pb) = factors(1, 24, 8), factors(2, 8, 8)
    va, vb = noise(3, (2, 4, 3, 3)), noise(4, (6, 2, 1, 1))
    own = lora("transformer.h.0.attn.c_attn", ca, cb) | lora("transformer.h.0.attn.c_proj", pa, pb)
    adapter = make_peft(tmp_path / "L", own | lora("transformer.conv", va, vb), fan_in_fan_out=True)
    changed = {
        "h.0.attn.c_attn.weight": tensors["h.0.attn.c_attn.weight"] + np.float32(1.5) * (cb @ ca).T,
        "h.0.attn.c_proj.weight": tensors["h.0.attn.c_proj.weight"] + np.float32(1.5) * (pb @ pa).T,
        "conv.weight": tensors["conv.weight"]
        + np.float32(1.5) * (vb.reshape(6, 2) @ va.reshape(2, 36)).reshape(6, 4, 3, 3),
    }
    check(merged(tmp_path, lora_model_path=adapter, base_model_path=base), tensors, changed)


@pytest.mark.parametrize("name", ["adapter", "adapter_pdparams"])
def test_paddleformers_own_lora_layer(tmp_path: Path, name: str) -> None:
    """Fused qkv_proj of two key-value heads, fused up_gate_proj, trained biases and norms, on a split base."""
    got = merged(tmp_path, lora_model_path=FIXTURES / name, base_model_path=FIXTURES / "base")
    want = read_model(FIXTURES / "merged")
    base = read_model(FIXTURES / "base")
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        np.testing.assert_allclose(array(got[key]), array(tensor), rtol=0, atol=3e-7, err_msg=key)
    assert sum(got[key] != base[key] for key in got) == 11


def test_an_adapter_of_paddle_on_either_layout(tmp_path: Path) -> None:
    """A is [in, rank], B [rank, out]; on a base of [out, in] the product is transposed, and a whole weight too."""
    base, tensors = make_base(tmp_path / "base")
    turned = {name: each.T.copy() if "proj.weight" in name else each for name, each in tensors.items()}
    paddle = make_model(tmp_path / "paddle", turned, config=CONFIG)
    a, b = noise(1, (8, 2)), noise(2, (2, 16))
    k = "model.layers.0.self_attn.k_proj.weight"
    whole = noise(3, (8, 8))
    adapter = make_paddle(tmp_path / "L", {f"{Q}.lora_A": a, f"{Q}.lora_B": b, k: whole})
    delta = np.float32(1.5) * (a @ b)
    changed = {f"{Q}.weight": tensors[f"{Q}.weight"] + delta.T, k: whole.T}
    check(merged(tmp_path, lora_model_path=adapter, base_model_path=base), tensors, changed)
    changed = {f"{Q}.weight": turned[f"{Q}.weight"] + delta, k: whole}
    check(merged(tmp_path, lora_model_path=adapter, base_model_path=paddle), turned, changed)


def test_a_split_adapter_on_a_fused_base(tmp_path: Path) -> None:
    """Each key-value head's queries, keys and values together: two of queries, one of keys, one of values."""
    name = "model.layers.0.self_attn"
    base, tensors = make_base(tmp_path / "base", shapes={f"{name}.qkv_proj.weight": (32, 8)})
    (qa, qb), (va, vb) = factors(1, 16, 8), factors(2, 8, 8)
    adapter = make_peft(tmp_path / "L", lora(f"{name}.q_proj", qa, qb) | lora(f"{name}.v_proj", va, vb))
    q, v = (1.5 * (qb @ qa)).reshape(2, 8, 8), (1.5 * (vb @ va)).reshape(2, 4, 8)
    delta = np.concatenate([q, np.zeros((2, 4, 8)), v], axis=1).reshape(32, 8)
    changed = {f"{name}.qkv_proj.weight": tensors[f"{name}.qkv_proj.weight"] + delta.astype(np.float32)}
    check(merged(tmp_path, lora_model_path=adapter, base_model_path=base), tensors, changed)


@pytest.mark.parametrize("words", [
    {"merge_method": "linear", "weight_list": (0.7, -0.4, 0.3)},
    {"merge_method": "ties"},
    {"merge_method": "dare_linear", "reserve_p": 0.6},
    {"merge_method": "della"},
], ids=lambda words: words["merge_method"])  # fmt: skip
def test_adapters_beside_full_models_with_any_method(tmp_path: Path, words: dict[str, Any]) -> None:
    """The methods act on the products, as on the differences of full models."""
    base, tensors = make_base(tmp_path / "base")
    first, one = adapter_of(tmp_path / "L1", 1, Q, DOWN)
    second, two = adapter_of(tmp_path / "L2", 11, Q, UP)
    full = {name: each + noise(50 + at, each.shape, 0.1) for at, (name, each) in enumerate(tensors.items())}
    model = make_model(tmp_path / "full", full, config=CONFIG)
    got = merged(tmp_path, model_path_list=[first, model, second], base_model_path=base, **words)
    recipe = modelfuse.Recipe.parse({"model_path_list": ["a", "b", "c"], "base_model_path": "d", **words})
    for name, tensor in tensors.items():
        zero = np.zeros_like(tensor)
        xs = [one.get(name, zero), full[name] - tensor, two.get(name, zero)]
        want = merge_tensor(xs, None, recipe.method, name) + tensor
        # Factors near a threshold may fall on its other side where the product was rounded otherwise.
        wrong = ~np.isclose(array(got[name]), want, rtol=0, atol=1e-5)
        assert wrong.mean() <= 0.02, name


def test_slerp_of_two_adapters(tmp_path: Path) -> None:
    base, tensors = make_base(tmp_path / "base")
    first, one = adapter_of(tmp_path / "L1", 1, Q)
    second, two = adapter_of(tmp_path / "L2", 11, Q)
    got = merged(tmp_path, model_path_list=[first, second], base_model_path=base, merge_method="slerp")
    name = f"{Q}.weight"
    want = merge_tensor([one[name], two[name]], None, applied("slerp", None, (0.5, 0.5)), name) + tensors[name]
    check(got, tensors, {name: want})


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "says"), [
    ({"peft_type": "LOHA"}, "LOHA"),
    ({"peft_type": "LOKR"}, "LOKR"),
    ({"init_lora_weights": "pissa"}, "pissa"),
    ({"init_lora_weights": "lora_ga"}, "lora_ga"),
    ({"layer_replication": [[0, 2]]}, "layer replication"),
    ({"trainable_token_indices": [1]}, "trainable tokens"),
    ({"r": 0}, "r is 0"),
    ({"lora_alpha": "much"}, "lora_alpha is 'much'"),
    ({"rank_pattern": {"(": 2}}, "rank_pattern is '('"),
])  # fmt: skip
def test_kinds_that_are_not_supported_are_named(
    tmp_path: Path, refuse: Refuse, config: dict[str, Any], says: str
) -> None:
    base, _ = make_base(tmp_path / "base")
    adapter, _ = adapter_of(tmp_path / "L", 1, Q, **config)
    words = ["--lora_model_path", adapter, "--base_model_path", base, "--output_path", tmp_path / "C"]
    refuse("merge", *words, says=[adapter, says])


@pytest.mark.parametrize(("config", "says"), [({"loraga": True}, "LoRA-GA"), ({"do_qat": True}, "quantization-aware")])
def test_paddle_s_kinds_that_are_not_supported(
    tmp_path: Path, refuse: Refuse, config: dict[str, Any], says: str
) -> None:
    base, _ = make_base(tmp_path / "base")
    adapter = make_paddle(tmp_path / "L", {f"{Q}.lora_A": noise(1, (8, 2)), f"{Q}.lora_B": noise(2, (2, 16))}, **config)
    refuse(
        "merge", "--lora_model_path", adapter, "--base_model_path", base, "--output_path", tmp_path / "C", says=[says]
    )


def test_an_adapter_that_meets_nothing_or_only_some(tmp_path: Path, refuse: Refuse) -> None:
    base, _ = make_base(tmp_path / "base")
    a, b = factors(1, 16, 8)
    out = ["--base_model_path", base, "--output_path", tmp_path / "C"]
    none = make_peft(tmp_path / "N", lora("encoder.block.3.wi", a, b))
    refuse("check", "--lora_model_path", none, *out, says=["None of the weights", "encoder.block.3.wi"], hint="base")
    some = make_peft(tmp_path / "S", lora(Q, a, b) | lora(Q.replace(".0.", ".7."), a, b))
    refuse("check", "--lora_model_path", some, *out, says=["1 of 2", "layers.7.self_attn.q_proj"], hint="base")
    wide = make_peft(tmp_path / "W", lora(UP, a, b))
    refuse("check", "--lora_model_path", wide, *out, says=["lora_A", f"{UP}.weight [10, 8]"], hint="base")
    rank = make_peft(tmp_path / "R", lora(Q, a, b), r=4)
    refuse("check", "--lora_model_path", rank, *out, says=["the rank of", "is 4"])
    alone = make_peft(tmp_path / "A", {f"{Q}.lora_A.weight": a})
    refuse("check", "--lora_model_path", alone, *out, says=["A or B is missing"])
    tokens = make_peft(tmp_path / "T", lora(Q, a, b) | {"lm_head.token_adapter.trainable_tokens_delta": a})
    refuse("check", "--lora_model_path", tokens, *out, says=["trainable_tokens_delta"])


def test_a_square_weight_of_paddle_is_never_guessed(tmp_path: Path, refuse: Refuse) -> None:
    base, tensors = make_base(tmp_path / "base", shapes={"o_proj.weight": (8, 8)})
    a, b = noise(1, (8, 2)), noise(2, (2, 8))
    adapter = make_paddle(tmp_path / "L", {"o_proj.lora_A": a, "o_proj.lora_B": b})
    words = ["--lora_model_path", adapter, "--base_model_path", base, "--output_path", tmp_path / "C"]
    refuse("check", *words, says=["cannot be known"], hint="--input_layout")
    paddle = make_model(tmp_path / "paddle", tensors, config={**CONFIG, "source": "paddle"})
    got = merged(tmp_path, lora_model_path=adapter, base_model_path=paddle)
    np.testing.assert_allclose(array(got["o_proj.weight"]), tensors["o_proj.weight"] + 1.5 * (a @ b), **CLOSE)


@pytest.mark.parametrize("part", "AB")
def test_nan_is_named_and_may_be_let_through(tmp_path: Path, refuse: Refuse, part: str) -> None:
    base, _ = make_base(tmp_path / "base")
    a, b = factors(1, 16, 8)
    (a if part == "A" else b)[1, 1] = np.nan
    adapter = make_peft(tmp_path / "L", lora(Q, a, b))
    words = ["--lora_model_path", adapter, "--base_model_path", base, "--output_path", tmp_path / "C"]
    refuse("merge", *words, says=[f"q_proj.lora_{part}.weight", adapter, "NaN"], hint="propagate")
    got = merged(tmp_path, lora_model_path=adapter, base_model_path=base, on_nonfinite="propagate")
    assert np.isnan(array(got[f"{Q}.weight"])).any()


def test_settings_that_do_not_fit(tmp_path: Path, refuse: Refuse) -> None:
    base, _ = make_base(tmp_path / "base")
    adapter, _ = adapter_of(tmp_path / "L", 1, Q)
    out = ["--output_path", tmp_path / "C"]
    refuse("merge", "--lora_model_path", adapter, *out, says=["lora_model_path needs base_model_path"])
    both = ["--lora_model_path", adapter, "--model_path_list", adapter, base, "--base_model_path", base]
    refuse("merge", *both, *out, says=["both given"])
    refuse("merge", "--model_path_list", adapter, base, *out, says=["is an adapter"], hint="--base_model_path")
    refuse("merge", "--model_path_list", base, "--base_model_path", adapter, *out, says=["is an adapter"])
    empty = tmp_path / "E"
    empty.mkdir()
    (empty / "adapter_config.json").write_text("{}")
    refuse("merge", "--lora_model_path", empty, "--base_model_path", base, *out, says=["adapter_model.safetensors"])


def test_one_model_and_a_base(tmp_path: Path) -> None:
    """A part of what fine-tuning changed."""
    base, tensors = make_base(tmp_path / "base")
    full = {name: each + 1 for name, each in tensors.items()}
    model = make_model(tmp_path / "full", full, config=CONFIG)
    got = merged(tmp_path, model_path_list=[model], base_model_path=base, weight_list=[0.5])
    check(got, tensors, {name: each + np.float32(0.5) for name, each in tensors.items()})
    whole = merged(tmp_path, model_path_list=[model], base_model_path=base)
    assert whole == read_model(model)


def test_memory_counts_the_factors(tmp_path: Path) -> None:
    base, _ = make_base(tmp_path / "base", shapes={"a.weight": (4000, 3000)})
    a, b = factors(1, 4000, 3000, 64)
    adapter = make_peft(tmp_path / "L", lora("a", a, b), r=64)
    without = modelfuse.check(model_path_list=[base, base], base_model_path=base)
    plan = modelfuse.check(lora_model_path=adapter, base_model_path=base)
    assert plan.memory > without.memory + a.nbytes + b.nbytes


def test_an_adapter_of_one_end_of_a_tied_pair_leaves_the_other_as_peft_s_forward_pass_has_it(
    tmp_path: Path, refuse: Refuse
) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"}
    base, tensors = make_base(tmp_path / "base", shapes=shapes, config={**CONFIG, "tie_word_embeddings": True})
    a, b = noise(1, (2, 13)), noise(2, (8, 2))
    name = "model.embed_tokens"
    adapter = make_peft(tmp_path / "L", {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b})
    own = tensors | {"lm_head.weight": tensors[f"{name}.weight"]}
    changed = {f"{name}.weight": tensors[f"{name}.weight"] + np.float32(1.5) * (b @ a).T}
    check(merged(tmp_path, lora_model_path=adapter, base_model_path=base), own, changed)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    both = make_model(tmp_path / "both", own, config={**CONFIG, "tie_word_embeddings": True})
    check(merged(tmp_path, lora_model_path=adapter, base_model_path=both), own, changed)
    a, b = factors(1, 13, 8)
    head = make_peft(tmp_path / "H", lora("lm_head", a, b))
    changed = {"lm_head.weight": tensors[f"{name}.weight"] + np.float32(1.5) * (b @ a)}
    check(merged(tmp_path, lora_model_path=head, base_model_path=base), own, changed)


@pytest.mark.parametrize("form", ["paddle", "pdparams"])
def test_an_adapter_into_the_other_world_s_layout(tmp_path: Path, form: str) -> None:
    """Merged and then turned, fused and all, is turned and then merged."""
    base, adapter = FIXTURES / "base", FIXTURES / "adapter"
    turned: dict[str, Any] = {"model_path_list": [FIXTURES / "merged"], "base_model_path": FIXTURES / "merged"}
    modelfuse.merge(**turned, output_path=tmp_path / "A", output_format=form)
    modelfuse.merge(lora_model_path=adapter, base_model_path=base, output_path=tmp_path / "B", output_format=form)
    assert modelfuse.verify(tmp_path / "B", full=True).holds
    want, got = (open_checkpoint(tmp_path / each) for each in "AB")
    assert "model.layers.0.self_attn.qkv_proj.weight" in want
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_allclose(load(got[name], True), load(tensor, True), rtol=0, atol=5e-7, err_msg=name)


def test_the_layout_of_square_weights_may_be_said(tmp_path: Path) -> None:
    base, tensors = make_base(tmp_path / "base", shapes={"model.layers.0.self_attn.o_proj.weight": (8, 8)})
    a, b = noise(1, (8, 2)), noise(2, (2, 8))
    (name,) = tensors
    module = name.removesuffix(".weight")
    adapter = make_paddle(tmp_path / "L", {f"{module}.lora_A": a, f"{module}.lora_B": b})
    for layout, delta in (("paddle", a @ b), ("hf", (a @ b).T)):
        got = merged(tmp_path, lora_model_path=adapter, base_model_path=base, input_layout=[layout])
        np.testing.assert_allclose(array(got[name]), tensors[name] + 1.5 * delta, **CLOSE)
