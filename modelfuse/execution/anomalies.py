"""Find tensors whose distance to the base is suspicious: equal to the base, or much further away than the others."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from msgspec import Struct

from modelfuse.planning.plan import Plan
from modelfuse.recipe.hub_names import HubName
from modelfuse.storage import PathOrUrl

if TYPE_CHECKING:
    from modelfuse.kernels.compiled.base_distance import Distance

#: Tensors are listed whose distance is more than this many times the median of their model.
FAR = 10.0


class Suspicious(Struct, frozen=True):
    """Suspicious tensors of one model.

    Attributes:
        path: The model, as the recipe names it.
        tensors: How many of its tensors were compared with the base's.
        equal: The names of those that equal the base's bit for bit.
        far: Names and relative distances ‖x − b‖ / ‖b‖ of those above ten times the median; None where the distance
            is undefined, as for a base of zeros.
        median: The median of the relative distances of the tensors that differ; None if there is none.
    """

    path: PathOrUrl | HubName
    tensors: int
    equal: tuple[str, ...]
    far: Mapping[str, float | None]
    median: float | None

    @property
    def summary(self) -> str:
        """The findings in a few words, without the model's path."""
        parts = []
        if self.equal:
            whole = len(self.equal) == self.tensors
            number = "all" if whole else f"{len(self.equal)} of {self.tensors}"
            parts.append(f"{number} tensors equal the base's")
        if self.far:
            parts.append(f"{len(self.far)} of {self.tensors} tensors are far from the base's")
        return ", ".join(parts)


def find_suspicious(plan: Plan, distances: Callable[[str], Sequence[Distance]]) -> tuple[Suspicious, ...]:
    """Check the distance of every tensor to the base's.

    Args:
        plan: The plan that was executed.
        distances: Maps a tensor's name to its distances, one per model; empty for a tensor that was not measured.

    Returns:
        The models with suspicious tensors.
    """
    found = []
    for number, path in enumerate(plan.recipe.model_path_list):
        # One number per tensor is kept: a model may have a hundred thousand of them.
        tensors, equal, known = 0, [], array("d")
        for name, distance in _of_model(plan, distances, number):
            tensors += 1
            if distance.equal:
                equal.append(name)
            elif distance.relative is not None:
                known.append(distance.relative)
        middle = median(known) if known else None
        far = {
            name: distance.relative
            for name, distance in _of_model(plan, distances, number)
            if not distance.equal
            and (distance.relative is None or (middle is not None and distance.relative > FAR * middle > 0))
        }
        if equal or far:
            found.append(Suspicious(path, tensors, tuple(equal), far, middle))
    return tuple(found)


def _of_model(
    plan: Plan, distances: Callable[[str], Sequence[Distance]], number: int
) -> Iterator[tuple[str, Distance]]:
    for tensor in plan.tensors:
        for source, distance in zip(tensor.inputs, distances(tensor.name), strict=False):
            if source == number:  # The base's index comes last and has no distance.
                yield tensor.name, distance
