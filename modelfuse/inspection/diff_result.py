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
    Advice,
    Change,
    Group,
    Kept,
    NotCompared,
    Pair,
    SideDifference,
    TensorFacts,
)
from modelfuse.inspection.diff_tables import Level, frame_of, html_of

__all__ = ["BLOCK", "DENSITIES", "OUTLYING", "PROBES", "Advice", "Change", "Diff", "Group", "Kept", "NotCompared",
           "Pair", "SideDifference", "TensorFacts"]  # fmt: skip


@dataclass(frozen=True, slots=True, repr=False)
class Diff:
    """How models differ from a base, and from each other.

    Attributes:
        base: What differences are taken to, as it was named: the base or, where none was given, the first model.
        base_given: Whether it was given as a base.
        models: All other models, as they were named; measures have their order.
        whole: Everything together.
        layers: Layer by layer, in the model's order.
        modules: By kind of module, over all layers.
        cells: By layer and kind of module: what a map of layers × modules shows.
        tensors: Tensor by tensor, in the base's order.
        facts: What else is known of each of ``tensors``, in their order.
        not_compared: Tensors that were not compared, and why.
        side_differences: What is different beside the weights.
        findings: What matters, in at most ten sentences.
        exact: Whether interference was computed exactly; else a matrix of more than PROBES (127) outputs is sketched.
        bytes_read: Bytes of the tensors that were read.
        seconds: Wall time.
        advice: Settings that are worth trying, the best first; by rules that were tested on other models.
    """

    base: str
    base_given: bool
    models: tuple[str, ...]
    whole: Group
    layers: tuple[Group, ...]
    modules: tuple[Group, ...]
    cells: tuple[Group, ...]
    tensors: tuple[Group, ...]
    facts: tuple[TensorFacts, ...]
    not_compared: tuple[NotCompared, ...]
    side_differences: tuple[SideDifference, ...]
    findings: tuple[str, ...]
    exact: bool
    bytes_read: int
    seconds: float
    advice: tuple[Advice, ...] = ()

    def telling(self, findings: Sequence[str], advice: Sequence[Advice] = ()) -> Diff:
        """The same with sentences on what matters, and what to try."""
        return replace(self, findings=tuple(findings), advice=tuple(advice))

    def to_pandas(self, level: Level = "tensors", *, pairs: bool = False) -> Any:
        """The numbers as a table of pandas.

        Args:
            level: What the rows are about: ``tensors``, ``layers``, ``modules``, ``cells`` or ``whole``.
            pairs: A row for each ordered pair of models; else one for each model.

        Returns:
            A ``pandas.DataFrame`` with what says where a group is (``name``, ``stack``, ``layer``, ``module``,
            ``tensors``, ``elements``), the models' names, and the fields of :class:`Change` (what sparsifiers keep as
            ``trim_squares_0.2`` and so on) or of :class:`Pair`. What is undefined is missing.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        return frame_of(self, level, pairs)

    def _repr_html_(self) -> str:
        return html_of(self)

    def __repr__(self) -> str:
        models: Sequence[str] = self.models
        return f"<Diff: {len(models)} model{'s' * (len(models) != 1)} against {self.base}: {len(self.tensors)} tensors>"
