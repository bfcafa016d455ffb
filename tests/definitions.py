"""Definitions of methods in numpy over whole tensors, which all backends are compared with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from modelfuse.methods import registry
from modelfuse.methods.applied import Applied
from modelfuse.methods.arrays import total
from modelfuse.methods.magprune import keep_probability
from modelfuse.methods.random import draws as random_draws
from modelfuse.methods.random import stream_key
from modelfuse.methods.slerp import coefficients
from modelfuse.methods.ties import MIN_DIVISOR
from modelfuse.methods.trim import kept_from, scale

#: A float32 or float64 array; its dtype is the one that arithmetic runs in.
Array = npt.NDArray[Any]


def applied(
    merge_type: str,
    sparsify_type: str | None,
    weights: Sequence[float],
    normalize: bool = False,
    *,
    seed: int = 0,
    **settings: Any,
) -> Applied:
    """A method by the names of its steps, with settings."""
    sparsifier = registry.SPARSIFIERS[sparsify_type] if sparsify_type else None
    combination = registry.COMBINATIONS[merge_type]
    return registry.apply(sparsifier, combination, weights, {"normalize": normalize, **settings}, seed=seed)


def changed(
    method: Applied, weights: Sequence[float] | None = None, merge_type: str | None = None, **settings: Any
) -> Applied:
    """The same method with other weights, another combination, other settings as far as it has them."""
    assert settings.keys() <= registry.PARAMETERS.keys()
    combination = registry.COMBINATIONS[merge_type] if merge_type else method.combination
    known = {**dict(method.settings), **settings}
    return registry.apply(method.sparsifier, combination, weights or method.weights, known, seed=method.seed)


def scalar(like: Array, value: float) -> Any:
    """A number rounded once into the type that ``like`` computes in."""
    return like.dtype.type(value)


def linear(xs: Sequence[Array], weights: Sequence[float]) -> Array:
    """The weighted sum of the models, or of their deltas to the base (task arithmetic).

    Formula: Σ wᵢ·xᵢ
    Paper: Wortsman et al. 2022, Model soups, arXiv:2203.05482; Ilharco et al. 2022, Editing models with task
        arithmetic, arXiv:2212.04089

    Args:
        xs: The models' tensors, all of one shape, float32 or float64.
        weights: One weight per model.
    """
    total = xs[0] * scalar(xs[0], weights[0])
    for x, weight in zip(xs[1:], weights[1:], strict=True):
        total = total + x * scalar(x, weight)
    summed: Array = total
    return summed


def ties(
    xs: Sequence[Array], weights: Sequence[float], *, ties_elect_type: str = "sum", normalize: bool = False
) -> Array:
    """The sum of the models whose sign, element by element, is the elected one.

    Formula: yᵢ = wᵢxᵢ; s = + where Σ yᵢ ≥ 0 (sum) or Σ sign yᵢ ≥ 0 (count), else −; Σ yᵢ over sign yᵢ = s, and
        with normalize ÷ Σ of their wᵢ
    Paper: Yadav et al. 2023, TIES-Merging, arXiv:2306.01708

    Args:
        xs: The models' tensors.
        weights: One weight per model.
        ties_elect_type: ``sum`` elects by value, ``count`` by number of models.
        normalize: Divide by the sum of the agreeing models' weights, where that is at least 1e-8 in size.
    """
    ys = [x * scalar(x, weight) for x, weight in zip(xs, weights, strict=True)]
    votes = ys if ties_elect_type == "sum" else [np.sign(y) for y in ys]
    elected = votes[0]
    for vote in votes[1:]:
        elected = elected + vote
    positive = elected >= 0
    result = np.zeros_like(xs[0])
    divisor = np.zeros_like(xs[0])
    for y, weight in zip(ys, weights, strict=True):
        agrees = np.where(positive, ~(y <= 0), ~(y >= 0))  # NaN agrees with every sign.
        result = result + np.where(agrees, y, scalar(y, 0))
        divisor = divisor + np.where(agrees, scalar(y, weight), scalar(y, 0))
    if not normalize:
        return result
    divides = np.abs(divisor) >= scalar(divisor, MIN_DIVISOR)
    divided: Array = result / np.where(divides, divisor, scalar(divisor, 1))
    return divided


def slerp(
    xs: Sequence[Array],
    *,
    slerp_alpha: float = 0.5,
    slerp_normalize_eps: float = 1e-8,
    slerp_dot_threshold: float = 0.9995,
) -> Array:
    """Spherical linear interpolation between exactly two models; straight where they are nearly parallel.

    Formula: sin((1−α)θ)/sin θ · x₁ + sin(αθ)/sin θ · x₂, with cos θ = x₁·x₂ / (‖x₁‖‖x₂‖)
    Paper: Shoemake 1985, Animating rotation with quaternion curves, SIGGRAPH

    Args:
        xs: The two models' tensors.
        slerp_alpha: 0 gives the first, 1 the second.
        slerp_normalize_eps: A tensor whose L2 norm is not above this is not normalised.
        slerp_dot_threshold: Above this |cos θ| the result is (1−α)x₁ + αx₂.
    """
    first, second = xs
    wide = [x.astype("float64") for x in xs]
    c1, c2 = coefficients(
        total(wide[0] * wide[0]),
        total(wide[1] * wide[1]),
        total(wide[0] * wide[1]),
        slerp_alpha,
        slerp_normalize_eps,
        slerp_dot_threshold,
    )
    result: Array = first * scalar(first, c1) + second * scalar(second, c2)
    return result


def trim(x: Array, *, reserve_p: float = 0.7, rescale: bool = True) -> Array:
    """Zero all but the largest share of the elements; rescale to the magnitude there was before.

    Formula: keep |x| ≥ the (1−p) quantile of |x|; × Σ|x| before ÷ Σ|x| after
    Paper: Yadav et al. 2023, TIES-Merging, arXiv:2306.01708

    Args:
        x: One model's tensor.
        reserve_p: The share p that is kept, in (0, 1].
        rescale: Restore the sum of magnitudes, where both sums are at least 1e-8.
    """
    magnitudes = np.abs(x)
    threshold = np.sort(magnitudes, axis=None)[kept_from(x.size, reserve_p)] if x.size else scalar(x, 0)
    kept = magnitudes >= threshold
    result = np.where(kept, x, scalar(x, 0))
    if rescale:
        result = result * scalar(x, scale(total(magnitudes), total(magnitudes[kept])))
    return result


def dare(x: Array, draws: Array, *, reserve_p: float = 0.7, rescale: bool = True) -> Array:
    """Keep each element with one probability and scale it up to keep the mean.

    Formula: x/p with probability p, else 0
    Paper: Yu et al. 2023, Language models are super Mario (DARE), arXiv:2311.03099

    Args:
        x: One model's tensor.
        draws: Uniform draws in [0, 1), float32, of the same shape.
        reserve_p: The probability p of keeping an element, in (0, 1].
        rescale: Divide what is kept by p.
    """
    kept = np.where(draws < np.float32(reserve_p), x, scalar(x, 0))
    return kept / scalar(x, reserve_p) if rescale else kept


def magprune(x: Array, draws: Array, *, reserve_p: float = 0.7, epsilon: float = 0.14, rescale: bool = True) -> Array:
    """Drop each element with a probability that grows with its rank by magnitude (DELLA's MagPrune).

    Formula: dropped with probability d = (1−p) − ε/2 + ε·r/n, r the rank by |x| from 0, the largest; else x/(1−d)
    Paper: Deep et al. 2024, DELLA-Merging, arXiv:2406.11617

    Args:
        x: One model's tensor. A tensor of zeros stays.
        draws: Uniform draws in [0, 1), float32, of the same shape.
        reserve_p: The mean probability p of keeping an element; p ± ε/2 must lie in (0, 1).
        epsilon: The spread ε between the largest and the smallest element.
        rescale: Divide what is kept by the probability of keeping it.
    """
    if not x.any():
        return x
    magnitudes = np.abs(x).ravel()
    order = np.sort(magnitudes)
    larger = x.size - np.searchsorted(order, magnitudes, side="right")
    equal = x.size - np.searchsorted(order, magnitudes, side="left") - larger
    ranks = (larger + (equal - 1) / 2).reshape(x.shape)
    keep = keep_probability(ranks, x.size, reserve_p, epsilon)
    kept = np.where(draws < keep.astype(np.float32), x, scalar(x, 0))
    return kept / keep.astype(x.dtype) if rescale else kept


MERGES: dict[str, Callable[..., Array]] = {"linear": linear, "slerp": slerp, "ties": ties}
SPARSIFIERS: dict[str, Callable[..., Array]] = {"trim": trim, "dare": dare, "magprune": magprune}
#: merge_method → (sparsify_type, merge_type)
MERGE_METHODS: dict[str, tuple[str | None, str]] = {
    "linear": (None, "linear"),
    "slerp": (None, "slerp"),
    "ties": ("trim", "ties"),
    "della": ("magprune", "ties"),
    "della_linear": ("magprune", "linear"),
    "dare_linear": ("dare", "linear"),
    "dare_ties": ("dare", "ties"),
}


def parameters(function: Callable[..., Array]) -> dict[str, object]:
    """A definition's settings and their defaults."""
    signature = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in signature if each.kind is each.KEYWORD_ONLY}


def merge_tensor(xs: Sequence[Array], base: Array | None, method: Applied, name: str) -> Array:
    """Merge one tensor, by definition.

    Args:
        xs: The models' tensors, all of one shape and of the compute type (float32 or float64).
        base: The base's tensor, or None: then the methods act on the weights themselves.
        method: What to do.
        name: The tensor's name in the output, which the random draws depend on.

    Returns:
        The merged tensor in the compute type.
    """
    if base is not None:
        xs = [x - base for x in xs]
    if method.sparsify_type is not None:
        xs = [_sparsify(x, model, method, name) for model, x in enumerate(xs)]
    function = MERGES[method.merge_type]
    arguments = [xs] if method.merge_type == "slerp" else [xs, method.weights]
    merged = function(*arguments, **options(method, function))
    return merged if base is None else merged + base


def options(method: Applied, function: Callable[..., Array], model: int = 0) -> dict[str, Any]:
    """The settings that a definition takes."""
    return {name: getattr(method.of(model), name) for name in parameters(function)}


def _sparsify(x: Array, model: int, method: Applied, name: str) -> Array:
    assert method.sparsify_type is not None
    function = SPARSIFIERS[method.sparsify_type]
    arguments = [x]
    if "draws" in inspect.signature(function).parameters:
        key = stream_key(method.seed, model, name)
        arguments.append(random_draws(key, 0, x.size).reshape(x.shape))
    return function(*arguments, **options(method, function, model))
