"""Every number of ``modelfuse diff`` against its definition, for every kind of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapting import DOWN, SHAPES, UP, Q, adapter_of, make_base
from conftest import Stored, array, bf16, make_model
from diff_definitions import Array, Whole, as_stored, hold, turned

from modelfuse.inspection import diff
from modelfuse.inspection.diff_result import Diff
from modelfuse.kernels import differences, interference
from modelfuse.kernels.arrays import plain
from modelfuse.kernels.compiled import bins
from modelfuse.kernels.interference import Interference
from modelfuse.kernels.matrices import Matrices
from modelfuse.planning.diff_plan import make_diff_plan

Tensors = Mapping[str, Any]
LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 40, "num_attention_heads": 4,
         "num_key_value_heads": 2, "tie_word_embeddings": False}  # fmt: skip
LAYER: dict[str, tuple[int, ...]] = {
    "self_attn.q_proj": (40, 40), "self_attn.k_proj": (20, 40), "self_attn.v_proj": (20, 40),
    "self_attn.o_proj": (40, 40), "mlp.gate_proj": (200, 40), "mlp.up_proj": (200, 40), "mlp.down_proj": (40, 200),
}  # fmt: skip


def llama_shapes(layers: int = 2) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (150, 40)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LAYER.items()}
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (40,)
    return shapes | {"model.norm.weight": (40,), "lm_head.weight": (1000, 40)}


def values(seed: int, shapes: Mapping[str, tuple[int, ...]], size: float = 1.0) -> dict[str, Array]:
    draw = np.random.default_rng(seed)
    return {name: (size * draw.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def tuned(base: Mapping[str, Array], seed: int, share: float = 0.6) -> dict[str, Array]:
    """Some elements changed, a few of them by much; norms not at all."""
    draw, result = np.random.default_rng(seed), {}
    for name, each in base.items():
        change = 0.1 * draw.standard_normal(each.shape) * (draw.random(each.shape) < share)
        change += 3.0 * (draw.random(each.shape) < 0.0005)
        result[name] = each if name.endswith("norm.weight") else (each + change).astype(np.float32)
    return result


def run(base: Path, *models: Path, exact: bool = False, **settings: object) -> Diff:
    return diff.carry_out(make_diff_plan(diff.diff_recipe([*models], base, settings), exact), True)


def wholes(
    base: Mapping[str, Array], *models: Mapping[str, Array], cut: Callable[[Array], list[Array]] = as_stored
) -> dict[str, Whole]:
    """Differences as of whole tensors; what the layers of ``LAYER`` hold is a matrix."""
    return {
        name: Whole(
            each.astype(np.float64),
            [model[name].astype(np.float64) - each.astype(np.float64) for model in models],
            cut if ".layers." in name and each.ndim == 2 else None,
            each.shape[-1],
        )
        for name, each in base.items()
    }


def hold_all(found: Diff, wanted: Mapping[str, Whole], *, sketched: bool = False, close: float = 2e-6) -> None:
    """Tensors, layers, modules and the whole."""
    assert {each.name for each in found.tensors} == set(wanted)
    large = {
        name
        for name, each in wanted.items()
        if sketched and each.matrices is not None and max(part.shape[0] for part in each.matrices(each.base)) > 127
    }
    for each in found.tensors:
        hold(each, [wanted[each.name]], sketched=each.name in large, close=close)
    hold(found.whole, [*wanted.values()], sketched=bool(large), close=close)
    for group in (*found.layers, *found.modules):
        names = [
            each.name for each in found.tensors
            if (each.layer == group.layer if group.module is None else each.module == group.module)
        ]  # fmt: skip
        hold(group, [wanted[name] for name in names], sketched=bool(large.intersection(names)), close=close)


@pytest.mark.parametrize(
    ("dtype", "exact"),
    [
        ("float32", False),
        ("float32", True),
        ("bfloat16", False),
        ("float16", False),
        ("float64", True),
        ("mixed", False),
    ],
)
def test_types(tmp_path: Path, dtype: str, exact: bool) -> None:
    plain = values(1, llama_shapes(1))
    models = [plain, tuned(plain, 2), tuned(plain, 3, 0.9)]
    stored: list[Tensors] = []
    for number, model in enumerate(models):
        kind = ["float32", "bfloat16", "float16"][number] if dtype == "mixed" else dtype
        stored.append({name: bf16(x) if kind == "bfloat16" else x.astype(kind) for name, x in model.items()})
    paths = [make_model(tmp_path / str(number), each, config=LLAMA) for number, each in enumerate(stored)]
    read = [{name: as_float(each) for name, each in model.items()} for model in stored]
    hold_all(run(*paths, exact=exact), wholes(*read), sketched=not exact)


def as_float(each: Any) -> Array:
    return array(each).astype(np.float64) if isinstance(each, Stored) else each.astype(np.float64)


def test_both_layouts_tell_the_same(tmp_path: Path) -> None:
    plain = values(1, llama_shapes(1))
    models = [plain, tuned(plain, 2), tuned(plain, 3)]
    there = [{name: each.T.copy() if ".layers." in name and each.ndim == 2 else each for name, each in model.items()}
             for model in models]  # fmt: skip
    hf = [make_model(tmp_path / f"hf{number}", each, config=LLAMA) for number, each in enumerate(models)]
    paddle = [make_model(tmp_path / f"paddle{number}", each, config=LLAMA) for number, each in enumerate(there)]
    hold_all(run(hf[0], paddle[1], hf[2]), wholes(*models), sketched=True)
    hold_all(run(paddle[0], hf[1], paddle[2]), wholes(*there, cut=turned), sketched=True)
    hold_all(run(paddle[0], hf[1], paddle[2], exact=True), wholes(*there, cut=turned))


def test_fused_layers_are_cut(tmp_path: Path) -> None:
    """Of a fused layer, each part's interference counts by itself; in GPT-NeoX, head by head."""
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    config = {"model_type": "gpt_neox", "hidden_size": 160, "num_attention_heads": 4, "num_hidden_layers": 1}
    base = {name: values(1, {name: (480, 160)})[name]}
    models = [base, tuned(base, 2), tuned(base, 3)]

    def parts(each: Array) -> list[Array]:
        heads = each.reshape(4, 3, 40, 160)
        return [heads[:, part].reshape(160, 160) for part in range(3)]

    paths = [make_model(tmp_path / str(number), each, config=config) for number, each in enumerate(models)]
    wanted = wholes(*models, cut=parts)
    hold(run(*paths).whole, [*wanted.values()], sketched=True)
    hold(run(*paths, exact=True).whole, [*wanted.values()])


def test_stacked_experts_are_matrices_of_their_own(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    config = {"model_type": "mixtral", "hidden_size": 24, "num_hidden_layers": 1, "num_local_experts": 3}
    base = {name: values(1, {name: (3, 340, 24)})[name]}
    models = [base, tuned(base, 2), tuned(base, 3)]

    def parts(each: Array) -> list[Array]:
        return [half for expert in each for half in (expert[:170], expert[170:])]

    paths = [make_model(tmp_path / str(number), each, config=config) for number, each in enumerate(models)]
    wanted = {name: dataclasses.replace(own, matrices=parts) for name, own in wholes(*models).items()}
    hold(run(*paths).whole, [*wanted.values()], sketched=True)
    hold(run(*paths, exact=True).whole, [*wanted.values()])


def test_tied_heads_count_once(tmp_path: Path) -> None:
    plain = values(1, llama_shapes(1))
    plain["lm_head.weight"] = plain["model.embed_tokens.weight"]
    other = tuned(plain, 2)
    other["lm_head.weight"] = other["model.embed_tokens.weight"]
    config = LLAMA | {"tie_word_embeddings": True}
    paths = [make_model(tmp_path / str(number), each, config=config) for number, each in enumerate((plain, other))]
    found = run(*paths)
    assert [(each.tensor, each.because) for each in found.not_compared] == [
        ("lm_head.weight", "tied to model.embed_tokens.weight")
    ]
    for each in (plain, other):
        del each["lm_head.weight"]
    hold_all(found, wholes(plain, other), sketched=True)


def test_adapters(tmp_path: Path) -> None:
    """An adapter's difference is what it adds; a full model beside it is compared as usual."""
    base, tensors = make_base(tmp_path / "base")
    one, deltas = adapter_of(tmp_path / "one", 5, Q, UP)
    full = {name: each + np.float32(0.1) * (number % 2) for number, (name, each) in enumerate(tensors.items())}
    two = make_model(tmp_path / "two", full, config={"model_type": "llama", "num_attention_heads": 4,
                                                     "num_key_value_heads": 2})  # fmt: skip
    three, others = adapter_of(tmp_path / "three", 9, DOWN, Q)
    adapted = [{name: each + own.get(name, 0) for name, each in tensors.items()} for own in (deltas, others)]
    exactly = [{name: own.get(name, np.zeros(shape)) for name, shape in SHAPES.items()} for own in (deltas, others)]
    wanted = wholes(tensors, adapted[0], full, adapted[1])
    for name, each in wanted.items():
        each.differences[0], each.differences[2] = exactly[0][name], exactly[1][name].astype(np.float64)
    found = run(base, one, two, three)
    hold_all(found, wanted, close=2e-5)
    assert [each.name for each in found.tensors if each.models[0].norm > 0] == [*deltas]


def test_quantized_models(tmp_path: Path) -> None:
    """fp8 models are the values that their codes stand for, against a plain base."""
    torch = pytest.importorskip("torch")
    from test_fp8 import BLOCKS, codes_of, expanded, scale_for, stored

    name = "model.layers.0.mlp.up_proj.weight"
    weights, plain = [], []
    for seed in (1, 2):
        codes, scale = codes_of((150, 140), seed), scale_for((2, 2), seed)
        weights.append({name: stored(codes), f"{name}_scale_inv": stored(scale)})
        plain.append({name: expanded(codes, scale, (128, 128)).to(torch.float64).numpy()})
    base = values(3, {name: (150, 140)})
    config = LLAMA | {"quantization_config": BLOCKS}
    paths = [make_model(tmp_path / str(number), each, config=config) for number, each in enumerate(weights)]
    found = run(make_model(tmp_path / "base", base, config=LLAMA), *paths)
    hold_all(found, wholes(base, *plain), sketched=True)
    found = run(paths[0], paths[1], make_model(tmp_path / "other", base, config=LLAMA))
    hold_all(found, wholes(plain[0], plain[1], base), sketched=True)


def test_values_that_are_not_finite_count_nowhere_else(tmp_path: Path) -> None:
    name, count = "model.norm.weight", 1000
    base = values(1, {name: (count,)})
    models = [tuned({"x": base[name]}, 2)["x"], tuned({"x": base[name]}, 3)["x"], base[name].copy()]
    models[0][[3, 5]], models[1][7] = np.nan, np.inf
    base[name][9] = -np.inf
    paths = [make_model(tmp_path / str(number), {name: each}, config=LLAMA) for number, each in enumerate(models)]
    found = run(make_model(tmp_path / "base", base, config=LLAMA), *paths).whole
    assert found.base_nonfinite == 1
    assert [each.nonfinite for each in found.models] == [2, 1, 1 - 1]
    good = [np.isfinite(each) & np.isfinite(base[name]) for each in models]
    assert found.models[0].unchanged == np.count_nonzero((models[0] == base[name])[good[0]]) / count
    assert found.models[2].unchanged == (count - 1) / count
    both = good[0] & good[1]
    one, other = (np.where(ok, each - base[name], 0) for ok, each in zip(good, models[:2], strict=False))
    wanted = np.count_nonzero((one * other < 0)[both]) / np.count_nonzero((one * other != 0)[both])
    assert found.pair(0, 1).sign_conflict == pytest.approx(wanted)
    assert np.isfinite(found.models[0].norm)


def test_workers_and_memory_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices, spans that are walked at the same time, and which worker does what."""
    shapes = llama_shapes(2) | {
        "model.embed_tokens.weight": (30_000, 40),
        "model.layers.0.mlp.up_proj.weight": (9000, 40),
    }
    shapes["model.layers.0.mlp.gate_proj.weight"] = (9000, 40)
    plain = values(1, shapes)
    paths = [make_model(tmp_path / str(number), {name: bf16(each) for name, each in model.items()}, config=LLAMA)
             for number, model in enumerate((plain, tuned(plain, 2), tuned(plain, 3)))]  # fmt: skip
    monkeypatch.setattr(diff, "SPAN", 1 << 18)
    found = []
    for settings in ({"n_process": 1}, {"n_process": 3}, {"n_process": 2, "memory": "80MB"}):
        result = run(*paths, **settings)
        found.append(dataclasses.replace(result, seconds=0))
    assert found[0] == found[1] == found[2]


def test_magnitudes_are_counted_alike_with_and_without_a_compiler() -> None:
    bits = np.abs(np.random.default_rng(1).standard_normal((3, 1000), np.float32)).view(np.int32)
    ours, theirs = np.zeros((2, 3, 8192), np.int64)
    plain.count_bins(bits, 18, ours)
    bins.count_bins(bits, 18, theirs)
    assert ours.sum() == 3000
    np.testing.assert_array_equal(ours, theirs)


def test_the_sketch_finds_its_own_error() -> None:
    """Over many matrices, estimates miss by as much as their standard errors say."""
    draw, misses = np.random.default_rng(1), []
    for number in range(40):
        scales = draw.standard_normal((2, 1, 30)) ** 2
        tau = (draw.standard_normal((2, 260, 30)) * scales).astype(np.float32)
        cut = Matrices(1, 260, 30) if number % 2 else Matrices(1, 30, 260, out_first=False)
        stored = np.stack([each if number % 2 else each.T for each in tau]).reshape(2, -1)
        sketch = Interference(str(number), cut, 2, exact=False)
        sketch.take(0, stored, stored.astype(np.float64))
        wanted = np.linalg.norm(tau[0].astype(np.float64) @ tau[1].astype(np.float64).T) ** 2
        misses.append((sketch.sums[0, 0, 1] - wanted) / sketch.sums[1, 0, 1] ** 0.5)
    assert abs(np.mean(misses)) < 0.6  # No bias.
    assert 0.2 < np.std(misses) < 1.6


@pytest.mark.parametrize("shape", [(300, 20), (20, 300)])
def test_exact_products_are_taken_either_way(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interference, "PANEL", 64)
    tau = np.random.default_rng(1).standard_normal((3, *shape)).astype(np.float32)
    exact = Interference("x", Matrices(1, *shape), 3, exact=True)
    exact.take(0, tau.reshape(3, -1), tau.reshape(3, -1).astype(np.float64))
    wide = tau.astype(np.float64)
    wanted = [[np.linalg.norm(other @ own.T) ** 2 for other in wide] for own in wide]
    np.testing.assert_allclose(exact.sums[0], wanted, rtol=1e-12)
    assert not exact.sums[1:].any()


def test_bits_are_counted_alike_by_older_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    words = differences.bits_of(np.random.default_rng(1).random((3, 1000)) < 0.3)
    counted = differences.ones_in(words)
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    monkeypatch.delattr(np, "vecdot", raising=False)
    np.testing.assert_array_equal(differences.ones_in(words), counted)
    rows = np.random.default_rng(2).standard_normal((2, 5, 7))
    found = interference._squares_of_dots(rows)
    np.testing.assert_allclose(found, np.einsum("irc,jrc->ijr", rows, rows).__pow__(2).sum(2))
