"""A configuration's method for one tensor, as the methods here are declared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from modelfuse.errors import RecipeError
from modelfuse.methods.applied import Applied
from modelfuse.methods.registry import COMBINATIONS, SPARSIFIERS, apply
from modelfuse.methods.spec import Combination, Sparsifier, Value

#: Parameters by name, None where one is not given.
Values = Mapping[str, float | int | bool | None]
#: What drops at random, and restores the sum of magnitudes there.
RANDOM = ("dare", "magprune")
#: Sums of weights below this are not divided by.
SMALLEST_SUM = 1e-8


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for one tensor.

    Attributes:
        name: The method.
        each: The parameters of every model, without the base's where the method compares with it.
        whole: Those of the merge.
        seed: Of random draws.
        streams: Each model's number, which its draws depend on.
    """

    name: str
    each: Sequence[Values]
    whole: Values
    seed: int
    streams: Sequence[int]

    def column(self, key: str) -> tuple[float, ...]:
        """One parameter of every model; NaN where it is not given."""
        return tuple(_number(each.get(key)) for each in self.each)

    def number(self, key: str) -> float:
        """A parameter of the merge."""
        return _number(self.whole.get(key))

    def applied(
        self,
        combination: str | Combination,
        weights: Sequence[float],
        settings: Mapping[str, Value | Sequence[Value]] = {},
        sparsifier: Sparsifier | None = None,
        factor: float = 1.0,
    ) -> Applied:
        """The steps with what was asked for."""
        chosen = COMBINATIONS[combination] if isinstance(combination, str) else combination
        return apply(sparsifier, chosen, weights, settings, seed=self.seed, streams=self.streams, factor=factor)


def _number(value: float | int | bool | None) -> float:
    return math.nan if value is None else float(value)


def method_of(request: Request) -> Applied:
    """The method that makes one tensor of its sources.

    Raises:
        RecipeError: If its parameters cannot be.
    """
    if request.name not in MAKERS:
        raise RecipeError(f"merge_method {request.name} is not there yet", f"There are {', '.join(MAKERS)}.")
    return MAKERS[request.name](request)


def _linear(request: Request) -> Applied:
    weights = request.column("weight")
    if request.whole["normalize"]:
        total = math.fsum(weights)
        if total == 0:
            raise RecipeError(
                "The weights of linear sum to zero, so they cannot be normalized", "Set normalize: false."
            )
        weights = tuple(weight / total for weight in weights)
    return request.applied("linear", weights)


def _slerp(request: Request) -> Applied:
    return request.applied("slerp", (1.0, 1.0), {"slerp_alpha": request.number("t")})


def _passthrough(request: Request) -> Applied:
    scale = request.each[0]["scale"]
    return request.applied("linear", (1.0 if scale is None else float(scale),))


def _family(sparsifier: str | None, elects: bool, gamma: float | None = None) -> Callable[[Request], Applied]:
    """A method that sparsifies differences, perhaps elects signs, and adds up.

    Args:
        sparsifier: Acts on models whose density is below 1. The largest elements are kept by ``breadcrumbs`` that cuts
            none of them.
        elects: Whether signs are elected.
        gamma: The share of the largest elements that is cut; None: as the configuration says.
    """

    def make(request: Request) -> Applied:
        weights, density = request.column("weight"), request.column("density")
        settings: dict[str, Value | Sequence[Value]] = {
            "reserve_p": density, "gamma": request.column("gamma") if gamma is None else gamma,
            "rescale": bool(request.whole["rescale"]), "normalize": bool(request.whole["normalize"]),
        }  # fmt: skip
        step = None if sparsifier is None or all(each >= 1 for each in density) else SPARSIFIERS[sparsifier]
        factor = request.number("lambda")
        if step is not None and sparsifier in RANDOM and (sparsifier == "magprune" or request.whole["rescale"]):
            raise RecipeError(
                f"merge_method {request.name} with a density below 1 is not there yet",
                "Use dare_linear or dare_ties with rescale: false, or settings of modelfuse's own.",
            )
        if elects:
            return request.applied("ties", weights, settings, step, factor)
        total = math.fsum(weights)
        if request.whole["normalize"] and abs(total) >= SMALLEST_SUM:
            factor /= total
        return request.applied("linear", weights, settings, step, factor)

    return make


def _model_stock(request: Request) -> Applied:
    if request.whole["filter_wise"]:
        raise RecipeError("filter_wise of model_stock is not there yet", "Leave it out.")
    return request.applied("model_stock", (1.0,) * len(request.each))


MAKERS: Mapping[str, Callable[[Request], Applied]] = {
    "linear": _linear,
    "slerp": _slerp,
    "passthrough": _passthrough,
    "task_arithmetic": _family(None, elects=False),
    "ties": _family("breadcrumbs", elects=True, gamma=0.0),
    "dare_linear": _family("dare", elects=False),
    "dare_ties": _family("dare", elects=True),
    "della_linear": _family("magprune", elects=False),
    "della": _family("magprune", elects=True),
    "breadcrumbs": _family("breadcrumbs", elects=False),
    "breadcrumbs_ties": _family("breadcrumbs", elects=True),
    "model_stock": _model_stock,
}
