"""The merge methods of configurations: their parameters, per model or of the merge, and the models that they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from modelfuse.recipe.arcee.parameters import Kind, Scalar

#: ``required``: a base is required. ``optional``: differences are taken to it, if there is one. ``ignored``: it is a
#: model like any other, or not used.
BaseRole = Literal["required", "optional", "ignored"]


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """A parameter of a method.

    Attributes:
        kind: The kind of its value.
        default: The default; None: the parameter is required, unless it is optional.
        optional: Whether it may be None.
    """

    kind: Kind
    default: Scalar | None = None
    optional: bool = False

    @property
    def is_required(self) -> bool:
        """Whether it is required."""
        return self.default is None and not self.optional


@dataclass(frozen=True, slots=True)
class MethodGrammar:
    """The models and parameters of a method.

    Attributes:
        models: The least and greatest number of models, without the base unless ``counts_base``.
        base: The role of a base model.
        counts_base: Whether the base is one of the models.
        per_model: Parameters of each model.
        whole: Parameters of the merge.
    """

    models: tuple[int, int | None]
    base: BaseRole
    per_model: Mapping[str, ParameterSpec]
    whole: Mapping[str, ParameterSpec]
    counts_base: bool = False


WEIGHT = ParameterSpec("number")
DENSITY = ParameterSpec("number", 1.0)
T = ParameterSpec("number")
#: Saves memory in mergekit; has no effect here.
INT8_MASK = ParameterSpec("switch", False)
#: Parameters that are accepted without effect.
WITHOUT_EFFECT = ("int8_mask",)


def _switch(default: bool) -> ParameterSpec:
    return ParameterSpec("switch", default)


def _task(normalize: bool, rescale: bool, **per_model: ParameterSpec) -> MethodGrammar:
    """A method that sparsifies differences, elects signs and sums."""
    whole = {"normalize": _switch(normalize), "rescale": _switch(rescale), "lambda": ParameterSpec("number", 1.0),
             "int8_mask": INT8_MASK}  # fmt: skip
    return MethodGrammar((0, None), "required", {"weight": WEIGHT, "density": DENSITY, **per_model}, whole)


def _ram(**whole: ParameterSpec) -> MethodGrammar:
    return MethodGrammar((0, None), "required", {}, {"epsilon": ParameterSpec("number", 1e-5), **whole})


GAMMA, SPREAD = ParameterSpec("number", 0.01), ParameterSpec("number", 0.15)

METHODS: Mapping[str, MethodGrammar] = {
    "linear": MethodGrammar((1, None), "ignored", {"weight": WEIGHT}, {"normalize": _switch(True)}),
    "slerp": MethodGrammar((2, 2), "required", {}, {"t": T}, counts_base=True),
    "nuslerp": MethodGrammar((2, 2), "optional", {"weight": WEIGHT},
                             {"nuslerp_flatten": _switch(True), "nuslerp_row_wise": _switch(False)}),
    "multislerp": MethodGrammar((1, None), "optional", {"weight": WEIGHT},
                                {"normalize_weights": _switch(True), "eps": ParameterSpec("number", 1e-8)}),
    "karcher": MethodGrammar((1, None), "ignored", {},
                             {"max_iter": ParameterSpec("count", 10), "tol": ParameterSpec("number", 1e-5)}),
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
                         {"select_topk": ParameterSpec("number", 1.0), "int8_mask": INT8_MASK}),
    "ram": _ram(),
    "ramplus_tl": _ram(r=ParameterSpec("number", 0.1), alpha=ParameterSpec("number", 0.2)),
    "passthrough": MethodGrammar((1, 1), "ignored", {"scale": ParameterSpec("number", optional=True)}, {}),
}  # fmt: skip
