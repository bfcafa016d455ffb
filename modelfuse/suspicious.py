"""Tensors whose distance to the base tells that something may be wrong: none at all, or far more than the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from modelfuse.adapters import Adapter
from modelfuse.plan import Plan

if TYPE_CHECKING:
    from modelfuse.kernels.distances import Distance

#: Distances of so many times the median of their model are listed.
FAR = 10.0


@dataclass(frozen=True, slots=True)
class Suspicious:
    """What stands out in one model.

    Attributes:
        path: The model.
        tensors: How many of its tensors were compared with the base's.
        equal: Those that are the base's, bit for bit.
        far: Those whose relative distance ‖x − b‖ / ‖b‖ is more than ten times the median, and that distance; None
            where there is no such number, as for a base of zeros.
        median: The median of the relative distances of the tensors that differ; None if there is none.
    """

    path: Path
    tensors: int
    equal: tuple[str, ...]
    far: Mapping[str, float | None]
    median: float | None

    @property
    def summary(self) -> str:
        """The same in a few words, without the model."""
        parts = []
        if self.equal:
            whole = len(self.equal) == self.tensors
            number = "all" if whole else f"{len(self.equal)} of {self.tensors}"
            parts.append(f"{number} tensors equal the base's")
        if self.far:
            parts.append(f"{len(self.far)} of {self.tensors} tensors are far from the base's")
        return ", ".join(parts)


def find_suspicious(plan: Plan, distances: Mapping[str, Sequence[Distance]]) -> tuple[Suspicious, ...]:
    """Look at the distances of every tensor to the base's.

    Args:
        plan: What was merged.
        distances: By tensor, one a model; empty for tensors that were not measured.

    Returns:
        The models in which something stands out.
    """
    found = []
    for number, model in enumerate(plan.models[:-1] if plan.has_base else ()):
        if isinstance(model, Adapter):
            continue  # It is meant to leave tensors as they are, and its products are not compared with weights.
        own = {tensor.name: each[number] for tensor in plan.tensors if (each := distances.get(tensor.name))}
        equal = tuple(name for name, distance in own.items() if distance.equal)
        moved = {name: distance.relative for name, distance in own.items() if not distance.equal}
        known = [distance for distance in moved.values() if distance is not None]
        middle = median(known) if known else None
        far = {name: each for name, each in moved.items() if each is None or (middle and each > FAR * middle)}
        if equal or far:
            found.append(Suspicious(model.path, len(own), equal, far, middle))
    return tuple(found)
