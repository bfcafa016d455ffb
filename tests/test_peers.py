"""The same merges by other programs: PaddleFormers' and arcee's mergekit.

The fixtures hold what those packages answered, and ``fixtures/peers/make_*.py`` how they were asked, and
in which points they differ from the definitions here. Each case is checked twice: against the plain
definitions in :mod:`modelfuse.methods`, and as a whole merge of the recorded inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from definitions import MERGE_METHODS, applied, dare, linear, magprune, merge_tensor, ties

import modelfuse
from modelfuse.methods.applied import Applied
from modelfuse.methods.magprune import keep_probability

FIXTURES = Path(__file__).parent / "fixtures" / "peers"
MODELS = ("model_1", "model_2", "model_3")
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "U8": np.dtype("u1")}
#: What the peers' sums in another order and type may differ by, in units of the terms' last place.
ULPS = 4.0
#: A draw that drops, whatever the probability; 0 keeps.
DROP = 1 - 2.0**-24
#: No statistic may lie further out; by chance one in ten million does.
SIGMAS = 5.3

Case = dict[str, Any]
Tensors = dict[str, npt.NDArray[Any]]
Float = npt.NDArray[np.float32]


@cache
def read(path: Path) -> Tensors:
    """A safetensors file, read by a few lines that are not modelfuse's."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header: dict[str, dict[str, Any]] = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors: Tensors = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(data[start:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def write(path: Path, tensors: Tensors) -> None:
    """The opposite of ``read``, for float32."""
    header: dict[str, object] = {}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    data = [tensor.tobytes() for tensor in tensors.values()]
    path.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *data]))


def group(path: Path, prefix: str) -> Tensors:
    """The tensors whose names begin with ``prefix/``, without it."""
    return {
        name.removeprefix(f"{prefix}/"): tensor for name, tensor in read(path).items() if name.startswith(f"{prefix}/")
    }


def inputs(peer: str, case: Case) -> tuple[list[Tensors], Tensors | None]:
    """A case's models, and its base if it has one."""
    path = FIXTURES / f"{peer}_inputs.safetensors"
    base = group(path, "base") if case["base"] else None
    return [group(path, name) for name in MODELS[: case["models"]]], base


def outputs(peer: str, case: Case) -> Tensors:
    """What the peer answered; the tensor ``cancels`` has a test of its own."""
    found = group(FIXTURES / f"{peer}_outputs.safetensors", case["name"])
    return {name: tensor for name, tensor in found.items() if name != "cancels"}


def cases(kind: str) -> list[Any]:
    """The recorded cases of one kind, as pytest parameters."""
    found = []
    for peer in ("paddle", "arcee"):
        for case in json.loads((FIXTURES / f"{peer}.json").read_text())["cases"]:
            if case["name"].startswith(kind):
                asked = case.get("merge_method") or f"{case.get('sparsify_type')}-{case['merge_type']}"
                found.append(pytest.param(peer, case, id=f"{peer}-{case['name']}-{asked}"))
    return found


def settings(case: Case) -> dict[str, Any]:
    """The case as keyword arguments of ``modelfuse.merge``, without paths.

    Paddle's two kinds of arithmetic, numpy's and its own, are both compared with ours.
    """
    other = ("name", "models", "base", "arcee", "tensor_type", "counts", "repeats")
    return {name: value for name, value in case.items() if name not in other}


def method(case: Case) -> Applied:
    """The case as the definitions want it: the weights made effective here, independently."""
    given = settings(case)
    weights, normalize = given.pop("weight_list", None), given.pop("normalize", False)
    steps = given.pop("merge_method", None)
    sparsify_type, merge_type = MERGE_METHODS[steps] if steps else (given.pop("sparsify_type", None), None)
    merge_type = merge_type or given.pop("merge_type")
    if weights is None:
        weights, normalize = [1.0] * case["models"], True
    if normalize and merge_type != "ties":  # which divides by them itself, so their scale is no matter
        weights = [weight / sum(weights) for weight in weights]
    return applied(merge_type, sparsify_type, tuple(weights), normalize, **given)


def check(got: Float, want: Float, terms: list[Float], gain: float) -> None:
    """Equal to within a few units in the last place of the terms that were added up."""
    size = np.sum([np.abs(term) for term in terms], axis=0) * np.float32(gain)
    assert got.shape == want.shape
    assert got.dtype == want.dtype == np.float32
    ulps = np.abs(got.astype("f8") - want) / np.spacing(size.astype("f4"))
    assert ulps.max() <= ULPS


def gain(case: Case) -> float:
    """By how much a method may make its inputs larger."""
    weights: list[float] = case.get("weight_list", [1.0])
    grown: float = 1 / case["reserve_p"] if "reserve_p" in case and case.get("rescale", True) else 1.0
    if case.get("normalize"):
        # Any of the models may be those that agree; weights of both signs cancel in the divisor.
        some = chain.from_iterable(combinations(weights, count) for count in range(1, len(weights) + 1))
        return grown * max(sum(map(abs, each)) / abs(sum(each)) for each in some)
    return max(1.0, grown * max(map(abs, weights)))


@pytest.mark.parametrize(("peer", "case"), cases("case"))
def test_definitions(peer: str, case: Case) -> None:
    models, base = inputs(peer, case)
    answered = outputs(peer, case)
    assert answered
    for name, want in answered.items():
        xs = [model[name] for model in models]
        b = base[name] if base else None
        got = merge_tensor(xs, b, method(case), name)
        check(got, want, xs + ([b] if b is not None else []), gain(case))


@pytest.mark.parametrize(("peer", "case"), cases("case"))
def test_merges(peer: str, case: Case, tmp_path: Path) -> None:
    models, base = inputs(peer, case)
    merged = merge(models, base, settings(case), tmp_path)
    assert set(merged) == set(models[0])
    for name, want in outputs(peer, case).items():
        terms = [model[name] for model in models] + ([base[name]] if base else [])
        check(merged[name], want, terms, gain(case))


def keeps_all(case: Case) -> bool:
    """Whether a case of ties with equal weights drops nothing."""
    return case.get("merge_method") == "ties" and case.get("reserve_p") == 1 and "weight_list" not in case


def test_models_that_cancel_elect_plus(tmp_path: Path) -> None:
    """Where the weighted differences add up to exactly zero, the sign is +, and not what rounding leaves.

    In bfloat16 fine-tunes, whose differences are multiples of one small number, two elements of a
    hundred are like that.
    """
    (case,) = (p.values[1] for p in cases("case") if p.values[0] == "paddle" and keeps_all(p.values[1]))
    models, base = inputs("paddle", case)
    assert base is not None
    want = group(FIXTURES / "paddle_outputs.safetensors", case["name"])["cancels"]
    xs = [model["cancels"] for model in models]
    check(merge_tensor(xs, base["cancels"], method(case), "cancels"), want, [*xs, base["cancels"]], 1.0)
    merged = merge(models, base, settings(case), tmp_path)["cancels"]
    check(merged, want, [*xs, base["cancels"]], 1.0)


def merge(models: list[Tensors], base: Tensors | None, given: dict[str, Any], folder: Path) -> Tensors:
    """One merge by modelfuse, from files to files."""
    named = {f"model_{number}": model for number, model in enumerate(models, 1)}
    paths = [str(folder / name) for name in named]
    if base is not None:
        given = given | {"base_model_path": str(folder / "base")}
        named["base"] = base
    for name, model in named.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        write(folder / name / "model.safetensors", model)
    modelfuse.merge(model_path_list=paths, output_path=str(folder / "merged"), **given)
    merged: Tensors = {}
    for path in (folder / "merged").glob("*.safetensors"):
        merged |= read(path)
    return merged


@pytest.mark.parametrize(("peer", "case"), cases("masked"))
def test_definitions_given_the_elements_that_a_peer_kept(peer: str, case: Case) -> None:
    models, base = inputs(peer, case)
    assert base is not None
    answered = outputs(peer, case)
    how = method(case)
    sparse = []
    for name, model in zip(MODELS, models, strict=True):
        kept = np.unpackbits(answered[f"kept_{name}"]).astype(bool).reshape(model["distinct"].shape)
        draws = np.where(kept, 0, DROP).astype("f4")
        sparse.append(sparsify(how)(model["distinct"] - base["distinct"], draws))
    if how.merge_type == "ties":
        merged = ties(sparse, how.weights, normalize=how.shared.normalize)
    else:
        merged = linear(sparse, how.weights)
    terms = [model["distinct"] for model in models] + [base["distinct"]]
    check(merged + base["distinct"], answered["distinct"], terms, gain(case))


def sparsify(how: Applied) -> Callable[[Float, Float], Float]:
    """The random step of a method, with its settings."""
    if how.sparsify_type == "dare":
        return lambda x, draws: dare(x, draws, reserve_p=how.shared.reserve_p, rescale=how.shared.rescale)
    return lambda x, draws: magprune(
        x, draws, reserve_p=how.shared.reserve_p, epsilon=how.shared.epsilon, rescale=how.shared.rescale
    )


def probabilities(how: Applied, size: int) -> npt.NDArray[np.floating[Any]]:
    """The definition's probability of keeping each rank, the largest magnitude first."""
    if how.sparsify_type == "dare":
        return np.full(size, how.shared.reserve_p)
    return keep_probability(np.arange(size, dtype="f8"), size, how.shared.reserve_p, how.shared.epsilon)


def check_counts(counts: npt.ArrayLike, expected: npt.NDArray[np.floating[Any]], repeats: int) -> None:
    """How often each bin of ranks was kept agrees with the probabilities of its members."""
    counted = np.asarray(counts, float)
    bins = expected.reshape(counted.size, -1)
    deviation = np.sqrt((bins * (1 - bins)).sum(axis=1) * repeats)
    assert np.abs(counted - bins.sum(axis=1) * repeats).max() < SIGMAS * deviation.max()


@pytest.mark.parametrize(("peer", "case"), cases("counts"))
def test_a_peer_keeps_each_rank_as_often_as_defined(peer: str, case: Case) -> None:
    """4000 repeats: a probability that is off by 0.001 would show in some bin."""
    models, _ = inputs(peer, case)
    expected = probabilities(method(case), models[0]["distinct"].size)
    check_counts(case["counts"], expected, case["repeats"])


@pytest.mark.parametrize(("peer", "case"), cases("counts"))
def test_merges_keep_each_rank_as_often_as_defined(peer: str, case: Case, tmp_path: Path) -> None:
    """One merge of many tensors with the recorded magnitudes: each is a repeat, by its name's draws."""
    models, base = inputs(peer, case)
    assert base is not None
    delta = models[0]["distinct"] - base["distinct"]
    order = np.argsort(-np.abs(delta), axis=None)
    names = [f"repeat_{number}" for number in range(60)]
    tuned, zero = dict.fromkeys(names, delta), dict.fromkeys(names, np.zeros_like(delta))
    # The second model is the base itself: what remains of the first is then seen alone.
    given = settings(case) | {"weight_list": [1.0, 1.0], "normalize": False}
    merged = merge([tuned, zero], zero, given, tmp_path)
    kept = np.array([merged[name].ravel()[order] != 0 for name in names])
    how = method(case)
    expected = probabilities(how, delta.size)
    check_counts(kept.reshape(len(names), len(case["counts"]), -1).sum(axis=(0, 2)), expected, len(names))
    scale = 1 / expected if how.shared.rescale else np.ones(delta.size)
    values = delta.ravel()[order] * scale
    for name, flags in zip(names, kept, strict=True):
        np.testing.assert_allclose(merged[name].ravel()[order][flags], values[flags], rtol=3e-4)
