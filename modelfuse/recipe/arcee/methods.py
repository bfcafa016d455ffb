"""The merge methods of configurations: which parameters each takes, for each model or as a whole, and which models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from modelfuse.recipe.arcee.parameters import Kind, Scalar

#: ``required``: there must be one. ``optional``: differences are taken to it if there is one. ``ignored``: it is a
#: model like any other, or not looked at.
BaseRole = Literal["required", "optional", "ignored"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a method.

    Attributes:
        kind: What it is.
        default: What it is where nothing is given; None where it must be given, unless it is optional.
        optional: Whether None is a value.
    """

    kind: Kind
    default: Scalar | None = None
    optional: bool = False

    @property
    def is_required(self) -> bool:
        """Whether it must be given."""
        return self.default is None and not self.optional


@dataclass(frozen=True, slots=True)
class MethodGrammar:
    """What a configuration may say of a method.

    Attributes:
        models: How many models there may be, the fewest and the most, without the base unless ``counts_base``.
        base: What a base model is to it.
        counts_base: Whether the base is one of the models.
        per_model: Parameters that each model has.
        whole: Parameters of the merge.
    """

    models: tuple[int, int | None]
    base: BaseRole
    per_model: Mapping[str, Parameter]
    whole: Mapping[str, Parameter]
    counts_base: bool = False


WEIGHT = Parameter("number")
DENSITY = Parameter("number", 1.0)
T = Parameter("number")
#: Saves memory there; here nothing is held.
INT8_MASK = Parameter("switch", False)
#: What is read and changes nothing.
WITHOUT_EFFECT = ("int8_mask",)


def _switch(default: bool) -> Parameter:
    return Parameter("switch", default)


def _task(normalize: bool, rescale: bool, **per_model: Parameter) -> MethodGrammar:
    """A method of the family that sparsifies differences, elects signs and adds up."""
    whole = {"normalize": _switch(normalize), "rescale": _switch(rescale), "lambda": Parameter("number", 1.0),
             "int8_mask": INT8_MASK}  # fmt: skip
    return MethodGrammar((0, None), "required", {"weight": WEIGHT, "density": DENSITY, **per_model}, whole)


def _ram(**whole: Parameter) -> MethodGrammar:
    return MethodGrammar((0, None), "required", {}, {"epsilon": Parameter("number", 1e-5), **whole})


GAMMA, SPREAD = Parameter("number", 0.01), Parameter("number", 0.15)

METHODS: Mapping[str, MethodGrammar] = {
    "linear": MethodGrammar((1, None), "ignored", {"weight": WEIGHT}, {"normalize": _switch(True)}),
    "slerp": MethodGrammar((2, 2), "required", {}, {"t": T}, counts_base=True),
    "nuslerp": MethodGrammar((2, 2), "optional", {"weight": WEIGHT},
                             {"nuslerp_flatten": _switch(True), "nuslerp_row_wise": _switch(False)}),
    "multislerp": MethodGrammar((1, None), "optional", {"weight": WEIGHT},
                                {"normalize_weights": _switch(True), "eps": Parameter("number", 1e-8)}),
    "karcher": MethodGrammar((1, None), "ignored", {},
                             {"max_iter": Parameter("count", 10), "tol": Parameter("number", 1e-5)}),
    "task_arithmetic": _task(False, False),
    "ties": _task(True, False),
    "dare_linear": _task(False, True),
    "dare_ties": _task(False, True),
    "breadcrumbs": _task(False, False, gamma=GAMMA),
    "breadcrumbs_ties": _task(False, False, gamma=GAMMA),
    "della": _task(True, True, epsilon=SPREAD),
    "della_linear": _task(False, True, epsilon=SPREAD),
    "model_stock": MethodGrammar((2, None), "required", {}, {"filter_wise": _switch(False)}),
    "nearswap": MethodGrammar((1, 1), "required", {}, {"t": T}),
    "arcee_fusion": MethodGrammar((1, 1), "required", {}, {}),
    "sce": MethodGrammar((0, None), "required", {},
                         {"select_topk": Parameter("number", 1.0), "int8_mask": INT8_MASK}),
    "ram": _ram(),
    "ramplus_tl": _ram(r=Parameter("number", 0.1), alpha=Parameter("number", 0.2)),
    "passthrough": MethodGrammar((1, 1), "ignored", {"scale": Parameter("number", optional=True)}, {}),
}  # fmt: skip
