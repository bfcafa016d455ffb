"""The result of ``modelfuse diff``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from modelfuse.inspection.diff_measures import (
    BLOCK,
    DENSITIES,
    OUTLYING,
    PROBES,
    Change,
    ComparedTensorFacts,
    Kept,
    ModelPair,
    NotCompared,
    SideDifference,
    Suggestion,
    TensorGroup,
)
from modelfuse.inspection.diff_tables import Level, frame_of, html_of

__all__ = [
    "BLOCK",
    "DENSITIES",
    "OUTLYING",
    "PROBES",
    "Change",
    "ComparedTensorFacts",
    "Diff",
    "Kept",
    "ModelPair",
    "NotCompared",
    "SideDifference",
    "Suggestion",
    "TensorGroup",
]  # fmt: skip


@dataclass(frozen=True, slots=True, repr=False)
class Diff:
    """Differences of models to a base, and to each other.

    Attributes:
        base: The model that differences are taken to, as the user named it: the base or, without one, the first model.
        base_given: Whether the user gave a base.
        models: All other models, as the user named them; all measures are in this order.
        whole: The measures of all tensors together.
        layers: Those of each layer, in the model's order.
        modules: Those of each kind of module, over all layers.
        cells: Those of each kind of module in each layer.
        tensors: Those of each tensor, in the base's order.
        facts: Type and shape of each of ``tensors``, in the same order.
        not_compared: Tensors that were not compared, and why.
        side_differences: Differences in the files beside the weights.
        findings: A summary in at most ten sentences.
        exact: Whether interference was computed exactly; else it is estimated for matrices of more than PROBES (127)
            outputs.
        bytes_read: Bytes of the tensors that were read.
        seconds: Wall time.
        advice: Settings that are worth trying, the best first.
    """

    base: str
    base_given: bool
    models: tuple[str, ...]
    whole: TensorGroup
    layers: tuple[TensorGroup, ...]
    modules: tuple[TensorGroup, ...]
    cells: tuple[TensorGroup, ...]
    tensors: tuple[TensorGroup, ...]
    facts: tuple[ComparedTensorFacts, ...]
    not_compared: tuple[NotCompared, ...]
    side_differences: tuple[SideDifference, ...]
    findings: tuple[str, ...]
    exact: bool
    bytes_read: int
    seconds: float
    advice: tuple[Suggestion, ...] = ()

    def with_findings(self, findings: Sequence[str], advice: Sequence[Suggestion] = ()) -> Diff:
        """A copy with these findings and this advice."""
        return replace(self, findings=tuple(findings), advice=tuple(advice))

    def to_pandas(self, level: Level = "tensors", *, pairs: bool = False) -> Any:
        """The measures as a pandas DataFrame.

        Args:
            level: The groups in rows: ``tensors``, ``layers``, ``modules``, ``cells`` or ``whole``.
            pairs: Whether each group has a row for each ordered pair of models, instead of one for each model.

        Returns:
            A ``pandas.DataFrame`` with the columns ``name``, ``stack``, ``layer``, ``module``, ``tensors`` and
            ``elements`` of the group, the models' names, and the fields of :class:`Change` (those of ``kept`` as
            ``trim_squares_0.2`` and so on) or of :class:`ModelPair`. Undefined values are missing.

        Raises:
            RecipeError: If there is no such level.
            MissingExtraError: If pandas is not installed.
        """
        return frame_of(self, level, pairs)

    def _repr_html_(self) -> str:
        return html_of(self)

    def __repr__(self) -> str:
        models: Sequence[str] = self.models
        return f"<Diff: {len(models)} model{'s' * (len(models) != 1)} against {self.base}: {len(self.tensors)} tensors>"
