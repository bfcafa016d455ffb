"""Tensors that are not merged: integers and other types without arithmetic, and second names of tied weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelfuse.errors import MismatchError
from modelfuse.kernels import Bytes, Extent, Procedure
from modelfuse.storage import Place

#: Differing tensors that an error lists.
MOST_LINES = 20


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor whose sources are not equal: its name, the first source's input, and those of the ones that differ."""

    name: str
    first: Place
    others: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor to copy.

    Attributes:
        name: Its name.
        chosen: The source to take where they differ; None: they must not differ.
        itemsize: Bytes an element.
        models: The inputs that the sources are of.
    """

    name: str
    chosen: int | None
    itemsize: int
    models: tuple[Place, ...]


def copy_procedure(copy: Copy, differences: list[Difference]) -> Procedure:
    """Write one source, after comparing it with the others; adds to ``differences`` where they differ."""
    return _procedure(copy, differences, writes=True)


def compare_procedure(copy: Copy, differences: list[Difference]) -> Procedure:
    """Only compare the sources."""
    return _procedure(copy, differences, writes=False)


def _procedure(copy: Copy, differences: list[Difference], writes: bool) -> Procedure:
    found = yield CopyPass(copy, writes)
    differing = sorted({source for span in found if span for source in span})
    if differing and copy.chosen is None:
        differences.append(Difference(copy.name, copy.models[0], tuple(copy.models[at] for at in differing)))


@dataclass
class CopyState:
    """The sources of a span that differ from the first."""

    bad: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=lambda: np.zeros(0, np.int64))
    differing: set[int] = field(default_factory=set)


class CopyPass:
    """Compares all sources byte by byte and passes one on."""

    def __init__(self, copy: Copy, writes: bool) -> None:
        self._copy, self._writes = copy, writes

    @property
    def writes(self) -> bool:
        return self._writes

    def start(self) -> CopyState:
        return CopyState()

    def read_from(self, state: CopyState, extents: Sequence[Extent]) -> bool:
        """Bytes are given to it."""
        return False

    def apply(self, state: CopyState, first: int, count: int, raws: Bytes, out: Bytes) -> None:
        nbytes = count * self._copy.itemsize
        for row in range(1, len(raws)):
            if not np.array_equal(raws[0, :nbytes], raws[row, :nbytes]):
                state.differing.add(row)
        if self._writes:
            out[:nbytes] = raws[self._copy.chosen or 0, :nbytes]

    def finish(self, state: CopyState) -> set[int]:
        return state.differing


def describe_unequal_pairs(differences: Sequence[Difference], what: str, hint: str) -> MismatchError:
    """What is to be said of pairs that should be equal, and what to do."""
    return MismatchError(f"{what}:\n" + _listed(each.name for each in differences), hint)


def describe_copies(differences: Sequence[Difference]) -> MismatchError:
    """Which of the models have another tensor than the first."""
    lines = (
        f"{each.name} of {each.first} is not that of {' and '.join(map(str, each.others))}" for each in differences
    )
    return MismatchError(
        "These tensors cannot be merged, only copied, but they differ:\n" + _listed(lines),
        "Say which model to take them from with --unmerged_from PATH.",
    )


def _listed(lines: Iterable[str]) -> str:
    """Lines in an order that does not depend on workers, the first ones only."""
    lines = sorted(lines)
    more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return "\n".join(f"  {line}" for line in [*lines[:MOST_LINES], *more])
