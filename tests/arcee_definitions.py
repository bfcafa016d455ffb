"""Definitions of the methods of mergekit's configurations, in float64 numpy over whole tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from modelfuse.methods.random import draws, stream_key

Array = npt.NDArray[np.float64]
#: Per-model parameters, one mapping per model.
Each = Sequence[Mapping[str, Any]]
Whole = Mapping[str, Any]


def norm(x: Array) -> float:
    return math.sqrt(math.fsum((x * x).ravel().tolist()))


def dot(x: Array, y: Array) -> float:
    return math.fsum((x * y).ravel().tolist())


def weights_of(each: Each) -> list[float]:
    return [own["weight"] for own in each]


# Interpolations -------------------------------------------------------------------------------------------------------


def linear(xs: list[Array], each: Each, whole: Whole) -> Array:
    weights = weights_of(each)
    result = sum(w * x for w, x in zip(weights, xs, strict=True))
    return np.asarray(result / sum(weights) if whole.get("normalize", True) else result)


def arc(a: Array, c: Array, t: float, straight: float, least: float, clamp: bool) -> Array:
    """Slerp of tensors that are not normalized; beyond the |cosine| ``straight``, linear interpolation."""
    norms = [max(norm(x), least) if clamp else (norm(x) if norm(x) > least else 1.0) for x in (a, c)]
    cosine = min(max(dot(a, c) / norms[0] / norms[1], -1.0), 1.0)
    if (clamp and 1 - cosine**2 <= straight) or (not clamp and abs(cosine) > straight):
        return (1 - t) * a + t * c
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * c) / math.sin(angle)


def slerp(xs: list[Array], each: Each, whole: Whole) -> Array:
    return arc(xs[0], xs[1], whole["t"], 0.9995, 1e-8, clamp=False)


def nuslerp(xs: list[Array], each: Each, whole: Whole) -> Array:
    first, second = weights_of(each)
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)

    def of(a: Array, c: Array) -> Array:
        return arc(a, c, t, 1e-16, 1e-7, clamp=True)

    if whole.get("nuslerp_flatten", True):
        return of(*xs)
    axis = 0 if whole.get("nuslerp_row_wise", False) else -1
    moved = [np.moveaxis(x, axis, -1) for x in xs]
    rows = [each.reshape(-1, each.shape[-1]) for each in moved]
    result = np.stack([of(a, c) for a, c in zip(*rows, strict=True)])
    return np.moveaxis(result.reshape(moved[0].shape), -1, axis)


def multislerp(vs: list[Array], each: Each, whole: Whole) -> Array:
    weights, eps = weights_of(each), whole.get("eps", 1e-8)
    if len(vs) == 1:
        return vs[0]
    if whole.get("normalize_weights", True):
        weights = [w / sum(weights) for w in weights]
    units = [v / (norm(v) + eps) for v in vs]
    mean = np.asarray(sum(w * u for w, u in zip(weights, units, strict=True)))
    if norm(mean) < eps:
        assert len(vs) == 2
        return np.asarray(sum(w * v for w, v in zip(weights, vs, strict=True)))
    mean = mean / norm(mean)
    tangent = np.asarray(sum(w * (u - dot(u, mean) * mean) for w, u in zip(weights, units, strict=True)))
    tau = norm(tangent) + eps
    size = sum(w * norm(v) for w, v in zip(weights, vs, strict=True))
    return np.asarray((mean * math.cos(tau) + tangent * math.sin(tau) / tau) * size)


def karcher(xs: list[Array], each: Each, whole: Whole) -> Array:
    tol = whole.get("tol", 1e-5)
    kept = [x / norm(x) for x in xs if norm(x) > tol]
    if not kept:
        return np.zeros_like(xs[0])
    mean = np.asarray(sum(kept) / len(kept))
    mean = mean / norm(mean) if norm(mean) >= tol else kept[0]
    for _ in range(whole.get("max_iter", 10)):
        step = np.zeros_like(mean)
        for u in kept:
            cosine = min(max(dot(u, mean), -1.0), 1.0)
            angle = math.acos(cosine)
            if angle >= tol:
                step += angle / math.sin(angle) * (u - cosine * mean) / len(kept)
        if norm(step) < tol:
            break
        mean = math.cos(norm(step)) * mean + math.sin(norm(step)) * step / norm(step)
        mean = mean / norm(mean)
    return np.asarray(mean * sum(norm(x) for x in xs) / len(xs))


def model_stock(ds: list[Array], each: Each, whole: Whole) -> Array:
    if whole.get("filter_wise", False) and ds[0].ndim > 1:
        rows = [d.reshape(-1, d.shape[-1]) for d in ds]
        return np.stack([model_stock([r[i] for r in rows], each, {}) for i in range(len(rows[0]))]).reshape(ds[0].shape)
    cosines = [min(max(dot(a, c) / max(norm(a) * norm(c), 1e-6), -1.0), 1.0) for a, c in combinations(ds, 2)]
    c, n = sum(cosines) / len(cosines), len(ds)
    divisor = 1 + (n - 1) * c
    t = 0.0 if abs(divisor) < 1e-6 else n * c / divisor
    return np.asarray(t * sum(ds) / n)


# Sparsifiers with weighted sums and sign election ---------------------------------------------------------------------


def largest(d: Array, own: Mapping[str, Any], random: Array) -> Array:
    """Keep the largest elements, including all that equal the smallest one kept."""
    order = np.sort(np.abs(d), axis=None)
    k = max(1, math.floor(own["density"] * d.size))
    return np.where(np.abs(d) >= order[d.size - k], d, 0.0)


def middle(d: Array, own: Mapping[str, Any], random: Array) -> Array:
    order, n = np.sort(np.abs(d), axis=None), d.size
    kept, top = math.floor(own["density"] * n), math.floor(own.get("gamma", 0.01) * n)
    bottom = max(0, n - kept - top)
    if not kept:
        return np.zeros_like(d)
    return np.where((np.abs(d) >= order[bottom]) & (np.abs(d) <= order[bottom + kept - 1]), d, 0.0)


def at_random(d: Array, own: Mapping[str, Any], random: Array) -> Array:
    return np.where(random < own["density"], d, 0.0)


def random_by_rank(d: Array, own: Mapping[str, Any], random: Array) -> Array:
    """Equal magnitudes share the mean of their ranks; a row of one element has the mean probability."""
    axis, epsilon = min(d.ndim - 1, 1), own.get("epsilon", 0.15)
    rows = np.moveaxis(np.abs(d), axis, -1)
    ranks = np.empty(rows.shape)
    for index in np.ndindex(rows.shape[:-1]):
        row = rows[index]
        ranks[index] = [((row < x).sum() + (row <= x).sum() - 1) / 2 for x in row]
    n = rows.shape[-1]
    keep = own["density"] - epsilon + 2 * epsilon * np.moveaxis(ranks, -1, axis) / max(n - 1, 1)
    return np.where(random < (keep if n > 1 else own["density"]), d, 0.0)


SPARSIFIERS = {
    "ties": largest, "dare_linear": at_random, "dare_ties": at_random, "breadcrumbs": middle,
    "breadcrumbs_ties": middle, "della": random_by_rank, "della_linear": random_by_rank,
}  # fmt: skip
ELECTS = {"ties", "dare_ties", "breadcrumbs_ties", "della"}
NORMALIZES = {"ties", "della"}
RESCALES = {"dare_linear", "dare_ties", "della", "della_linear"}


def family(name: str, ds: list[Array], each: Each, whole: Whole, tensor: str, seed: int) -> Array:
    weights = weights_of(each)
    for model, (d, own) in enumerate(zip(ds, each, strict=True)):
        if name not in SPARSIFIERS or own.get("density", 1.0) >= 1:
            continue
        random = draws(stream_key(seed, model, tensor), 0, d.size).astype(np.float64).reshape(d.shape)
        kept = SPARSIFIERS[name](d, own, random) if own["density"] > 0 else np.zeros_like(d)
        before, after = (math.fsum(np.abs(x).ravel().tolist()) for x in (d, kept))
        rescales = whole.get("rescale", name in RESCALES) and before >= 1e-7 and after >= 1e-7
        ds[model] = kept * (before / after) if rescales else kept
    ys = [w * d for w, d in zip(weights, ds, strict=True)]
    normalize = whole.get("normalize", name in NORMALIZES)
    if name in ELECTS:
        sign = np.where(sum(ys) >= 0, 1.0, -1.0)
        agrees = [np.sign(y) == sign for y in ys]
        result = np.asarray(sum(np.where(a, y, 0.0) for a, y in zip(agrees, ys, strict=True)))
        divisor = np.asarray(sum(np.where(a, w, 0.0) for a, w in zip(agrees, weights, strict=True)))
        result = result / np.where(divisor == 0, 1.0, divisor) if normalize else result
    else:
        result = np.asarray(sum(ys))
        result = result / (1.0 if abs(sum(weights)) < 1e-8 else sum(weights)) if normalize else result
    return np.asarray(result * whole.get("lambda", 1.0))


# Element by element ---------------------------------------------------------------------------------------------------


def nearswap(ds: list[Array], each: Each, whole: Whole) -> Array:
    return np.asarray(np.clip(whole["t"] / np.maximum(np.abs(ds[0]), 1e-6), 0, 1) * ds[0])


def arcee_fusion(ds: list[Array], base: Array) -> Array:
    x = ds[0] + base

    def softmax(values: Array) -> Array:
        powers = np.exp(values - values.max(axis=-1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=-1, keepdims=True) + 1e-8)

    p, q = softmax(x), softmax(base)
    importance = np.abs(ds[0]) * (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    order = np.sort(importance, axis=None)
    low, median, high = (order[math.floor(share * (x.size - 1))] for share in (0.25, 0.5, 0.75))
    return np.where(importance >= median + 1.5 * (high - low), ds[0], 0.0)


def sce(ds: list[Array], each: Each, whole: Whole) -> Array:
    stack, topk = np.stack(ds), whole.get("select_topk", 1.0)
    if topk < 1:
        variance = stack.var(axis=0)
        k = math.floor(topk * np.count_nonzero(variance))
        edge = np.sort(variance, axis=None)[variance.size - k] if k else np.inf
        stack = stack * (variance >= edge)
    squares = np.array([(d * d).mean() for d in stack])
    weights = np.full(len(ds), 1 / len(ds)) if squares.sum() < 1e-6 else squares / squares.sum()
    sign = np.where(stack.sum(axis=0) >= 0, 1.0, -1.0)
    agreeing = weights.reshape(-1, *[1] * ds[0].ndim) * (np.sign(stack) == sign)
    return np.asarray((stack * agreeing).sum(axis=0) / np.maximum(agreeing.sum(axis=0), 1e-6))


def ram(ds: list[Array], each: Each, whole: Whole, plus: bool = False) -> Array:
    stack, epsilon = np.stack(ds), whole.get("epsilon", 1e-5)
    active = np.abs(stack) > epsilon
    count = active.sum(axis=0)
    gains = np.ones(len(ds))
    for model, own in enumerate(active) if plus else ():
        ratio = (own & (count > 1)).sum() / max((own & (count == 1)).sum(), epsilon)
        gains[model] = 1 + whole.get("r", 0.1) * min(max(ratio, 0.0), whole.get("alpha", 0.2))
    unique = (stack * active * gains.reshape(-1, *[1] * ds[0].ndim)).sum(axis=0) * (count == 1)
    shared = (stack * active).sum(axis=0) / np.maximum(count, 1) * (count > 1)
    return np.asarray(unique + shared)


PLAIN = {
    "linear": linear, "slerp": slerp, "nuslerp": nuslerp, "multislerp": multislerp, "karcher": karcher,
    "model_stock": model_stock, "nearswap": nearswap, "sce": sce, "ram": ram,
}  # fmt: skip


def merge(
    name: str, xs: Sequence[Array], base: Array | None, each: Each, whole: Whole, *, tensor: str = "w", seed: int = 0
) -> Array:
    """Merge one tensor of float64 values."""
    ds = [x - base for x in xs] if base is not None else list(xs)
    if name == "arcee_fusion":
        assert base is not None
        merged = arcee_fusion(ds, base)
    elif name == "ramplus_tl":
        merged = ram(ds, each, whole, plus=True)
    elif name == "passthrough":
        merged = ds[0] * (1.0 if each[0].get("scale") is None else each[0]["scale"])
    elif name in PLAIN:
        merged = PLAIN[name](ds, each, whole)
    else:
        merged = family(name, ds, each, whole, tensor, seed)
    return merged if base is None else merged + base
