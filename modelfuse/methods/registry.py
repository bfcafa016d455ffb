"""The methods by name, and a merge of one tensor by their definitions.

A merge of one tensor has two steps. The *sparsifier* acts on each model alone, then the *merge*
makes one tensor of all. ``MERGE_METHODS`` gives the usual pairs their names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modelfuse.methods.arrays import Array
from modelfuse.methods.dare import dare
from modelfuse.methods.linear import linear
from modelfuse.methods.magprune import magprune
from modelfuse.methods.random import draws, stream_key
from modelfuse.methods.slerp import slerp
from modelfuse.methods.ties import ties
from modelfuse.methods.trim import trim

__all__ = ["MERGES", "MERGE_METHODS", "SPARSIFIERS", "TAKE", "Method", "describe", "merge_tensor"]

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


@dataclass(frozen=True, slots=True)
class Method:
    """All that a merge of any tensor needs to know.

    Attributes:
        merge_type: A key of ``MERGES``.
        sparsify_type: A key of ``SPARSIFIERS``, or None.
        weights: One weight a model; where ties divides by them, before they are divided by their sum.
        normalize: Whether ties divides by the agreeing weights.
        seed: The seed of all random draws.

    The others are the settings of the same names in the recipe.
    """

    merge_type: str
    sparsify_type: str | None
    weights: tuple[float, ...]
    normalize: bool = False
    slerp_alpha: float = 0.5
    slerp_normalize_eps: float = 1e-8
    slerp_dot_threshold: float = 0.9995
    ties_elect_type: str = "sum"
    rescale: bool = True
    reserve_p: float = 0.7
    epsilon: float = 0.14
    seed: int = 0

    @property
    def counts_magnitudes(self) -> bool:
        """Whether magnitudes are counted before anything is merged."""
        return self.sparsify_type in ("trim", "magprune")

    @property
    def reads_twice(self) -> bool:
        """Whether tensors are measured before they are merged."""
        return self.counts_magnitudes or self.merge_type == "slerp"

    @property
    def coefficients(self) -> tuple[float, ...] | None:
        """The models' factors where the result is a weighted sum of them, whatever they hold; None if it is not."""
        return self.weights if (self.sparsify_type, self.merge_type) == (None, "linear") else None

    def described(self) -> dict[str, object]:
        """All that it depends on by name, for a report; the seed, which is the recipe's, apart."""
        steps = [MERGES[self.merge_type], *([SPARSIFIERS[self.sparsify_type]] if self.sparsify_type else [])]
        options = {name: value for step in steps for name, value in self.options(step).items()}
        weights = {"weights": list(self.weights)} if self.merge_type != "slerp" else {}
        return {"merge_type": self.merge_type, "sparsify_type": self.sparsify_type, **weights, **options}

    def options(self, function: Callable[..., Array]) -> dict[str, object]:
        """The settings that a definition takes as keyword-only arguments."""
        return {name: getattr(self, name) for name in parameters(function)}


#: What makes one tensor of itself.
TAKE = Method("linear", None, (1.0,))


def parameters(function: Callable[..., Array]) -> dict[str, object]:
    """A definition's settings and their defaults: its signature is its schema."""
    signature = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in signature if each.kind is each.KEYWORD_ONLY}


@dataclass(frozen=True, slots=True)
class Description:
    """What ``modelfuse methods`` prints of a step, read from its docstring."""

    summary: str
    formula: str
    paper: str


def describe(function: Callable[..., Array]) -> Description:
    """Read a definition's docstring: one sentence, its formula and its paper.

    >>> describe(linear).formula
    'Σ wᵢ·xᵢ'
    """
    summary, facts, *_ = (inspect.getdoc(function) or "").split("\n\n")
    formula, _, paper = " ".join(facts.split()).removeprefix("Formula: ").partition(" Paper: ")
    return Description(" ".join(summary.split()), formula, paper)


def merge_tensor(xs: Sequence[Array], base: Array | None, method: Method, name: str) -> Array:
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
    merged = function(*arguments, **method.options(function))
    return merged if base is None else merged + base


def _sparsify(x: Array, model: int, method: Method, name: str) -> Array:
    assert method.sparsify_type is not None
    function = SPARSIFIERS[method.sparsify_type]
    arguments = [x]
    if "draws" in inspect.signature(function).parameters:
        key = stream_key(method.seed, model, name)
        arguments.append(draws(key, 0, x.size).reshape(x.shape))
    return function(*arguments, **method.options(function))
