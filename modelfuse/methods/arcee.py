"""The methods of mergekit configurations, with mergekit's defaults.

They have a table of their own, as some differ from the method of the same name in flat recipes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from modelfuse.methods.applied import Applied
from modelfuse.methods.arcee_fusion import ARCEE_FUSION
from modelfuse.methods.breadcrumbs import BREADCRUMBS
from modelfuse.methods.karcher import KARCHER
from modelfuse.methods.largest import LARGEST
from modelfuse.methods.linear import LINEAR
from modelfuse.methods.model_stock import MODEL_STOCK
from modelfuse.methods.multislerp import MULTISLERP
from modelfuse.methods.nearswap import NEARSWAP
from modelfuse.methods.nuslerp import NUSLERP
from modelfuse.methods.ram import RAM, RAMPLUS_TL
from modelfuse.methods.random_keep import RANDOM, RANDOM_BY_RANK
from modelfuse.methods.registry import apply
from modelfuse.methods.sce import SCE
from modelfuse.methods.slerp import SLERP
from modelfuse.methods.spec import Combination, Sparsifier, Value
from modelfuse.methods.ties import ELECT

#: A parameter's value in a configuration; None if it is not given.
Given = float | int | bool | str | None
#: Weights are not divided by their sum if it is closer to zero than this.
MIN_SUM = 1e-8


@dataclass(frozen=True, eq=False)
class ArceeMethod:
    """The meaning of a configuration's ``merge_method``.

    Attributes:
        combination: Combines the models' tensors.
        sparsifier: Acts on each model first; skipped if every density is at least 1.
        names: Maps its parameters to settings.
        defaults: mergekit's defaults, for parameters where they differ from those of the settings.
        divides: The parameter that says whether weights are divided by their sum.
        guarded: Whether a sum of weights close to zero skips the division; else it is an error.
    """

    combination: Combination
    sparsifier: Sparsifier | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Value] = field(default_factory=dict)
    divides: str | None = None
    guarded: bool = False


def _family(sparsifier: Sparsifier | None, *, elects: bool, normalize: bool, rescale: bool = False) -> ArceeMethod:
    """A method that sparsifies the differences, optionally elects signs, and sums."""
    return ArceeMethod(
        ELECT if elects else LINEAR,
        sparsifier,
        {"density": "reserve_p", **{name: name for name in ("gamma", "epsilon", "rescale", "normalize")}},
        {"density": 1.0, "epsilon": 0.15, "rescale": rescale, "normalize": normalize},
        divides=None if elects else "normalize",
        guarded=True,
    )


METHODS: Mapping[str, ArceeMethod] = {
    "linear": ArceeMethod(LINEAR, defaults={"normalize": True}, divides="normalize"),
    "slerp": ArceeMethod(SLERP, names={"t": "slerp_alpha"}),
    "nuslerp": ArceeMethod(
        NUSLERP, names={"nuslerp_flatten": "nuslerp_flatten", "nuslerp_row_wise": "nuslerp_row_wise"}
    ),
    "multislerp": ArceeMethod(
        MULTISLERP, names={"eps": "multislerp_eps"}, defaults={"normalize_weights": True}, divides="normalize_weights"
    ),
    "karcher": ArceeMethod(KARCHER, names={"max_iter": "karcher_max_iter", "tol": "karcher_tol"}),
    "task_arithmetic": _family(None, elects=False, normalize=False),
    "ties": _family(LARGEST, elects=True, normalize=True),
    "dare_linear": _family(RANDOM, elects=False, normalize=False, rescale=True),
    "dare_ties": _family(RANDOM, elects=True, normalize=False, rescale=True),
    "breadcrumbs": _family(BREADCRUMBS, elects=False, normalize=False),
    "breadcrumbs_ties": _family(BREADCRUMBS, elects=True, normalize=False),
    "della": _family(RANDOM_BY_RANK, elects=True, normalize=True, rescale=True),
    "della_linear": _family(RANDOM_BY_RANK, elects=False, normalize=False, rescale=True),
    "model_stock": ArceeMethod(MODEL_STOCK, names={"filter_wise": "filter_wise"}),
    "nearswap": ArceeMethod(NEARSWAP, names={"t": "nearswap_t"}),
    "arcee_fusion": ArceeMethod(ARCEE_FUSION),
    "sce": ArceeMethod(SCE, names={"select_topk": "select_topk"}),
    "ram": ArceeMethod(RAM, names={"epsilon": "ram_epsilon"}),
    "ramplus_tl": ArceeMethod(RAMPLUS_TL, names={"epsilon": "ram_epsilon", "r": "ram_r", "alpha": "ram_alpha"}),
    "passthrough": ArceeMethod(LINEAR),
}


def applied(
    name: str,
    each: Sequence[Mapping[str, Given]],
    whole: Mapping[str, Given],
    *,
    seed: int = 0,
    streams: Sequence[int] = (),
) -> Applied:
    """A configuration's method for one tensor.

    Args:
        name: The ``merge_method``, a key of :data:`METHODS`.
        each: The parameters of each merged model, in order: without the base for methods with a base; for slerp, the
            base's first.
        whole: The parameters of the merge.
        seed: The seed of all random draws.
        streams: Each model's index, which its draws depend on; empty: in order.

    Raises:
        ValueError: If the parameters are invalid.
    """
    method = METHODS[name]
    given = {**method.defaults, **{key: value for key, value in whole.items() if value is not None}}
    weights = [_number(own, "weight", _scale(own) if name == "passthrough" else 1.0) for own in each]
    if method.divides and given[method.divides]:
        weights = _divided(name, weights, method.guarded)
    settings: dict[str, Value | Sequence[Value]] = {}
    for key, setting in method.names.items():
        if any(own.get(key) is not None for own in each):
            settings[setting] = [_number(own, key, given.get(key, math.nan)) for own in each]
        elif key in given:
            value = given[key]
            assert value is not None
            settings[setting] = value if isinstance(value, bool | str) else float(value)
    sparsifier = _sparsifier(method, settings, len(each))
    factor = _number(whole, "lambda", 1.0)
    return apply(sparsifier, method.combination, weights, settings, seed=seed, streams=streams, factor=factor)


def _number(given: Mapping[str, Given], key: str, default: Given) -> float:
    value = given.get(key)
    return float(default if value is None else value)  # type: ignore[arg-type]


def _scale(given: Mapping[str, Given]) -> float:
    return _number(given, "scale", 1.0)


def _divided(name: str, weights: Sequence[float], guarded: bool) -> list[float]:
    whole = math.fsum(weights)
    if guarded and abs(whole) < MIN_SUM:
        return list(weights)
    if not whole:
        raise ValueError(f"The weights of {name} sum to zero, so they cannot be normalized")
    return [weight / whole for weight in weights]


def _sparsifier(method: ArceeMethod, settings: Mapping[str, Value | Sequence[Value]], models: int) -> Sparsifier | None:
    """The sparsifier, unless it drops nothing; its settings are checked for every model."""
    if method.sparsifier is None:
        return None
    known = apply(method.sparsifier, method.combination, (1.0,) * models, settings)
    if all(known.of(model).reserve_p >= 1 for model in range(models)):
        return None
    for model in range(models):
        method.sparsifier.check(known.of(model))
    return method.sparsifier
