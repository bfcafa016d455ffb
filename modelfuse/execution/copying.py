"""Copy tensors that are not merged (integers and other types without arithmetic), and compare tied weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from msgspec import Struct, field

from modelfuse.errors import MismatchError
from modelfuse.kernels import Bytes, Extent, Procedure
from modelfuse.storage import PathOrUrl

#: The most differing tensors that an error lists.
MOST_LINES = 20


class Difference(Struct, frozen=True):
    """A tensor whose sources differ: its name, the first source's input, and the inputs of the sources that differ."""

    name: str
    first: PathOrUrl
    others: tuple[PathOrUrl, ...]


class Copy(Struct, frozen=True):
    """A tensor to copy.

    Attributes:
        name: Its name.
        chosen: The index of the source to copy if they differ; None: differing sources are an error.
        itemsize: Bytes per element.
        models: The inputs of the sources.
    """

    name: str
    chosen: int | None
    itemsize: int
    models: tuple[PathOrUrl, ...]


def copy_procedure(copy: Copy, differences: list[Difference]) -> Procedure:
    """Write one source and compare it with the others; a mismatch is appended to ``differences``."""
    return _procedure(copy, differences, writes=True)


def compare_procedure(copy: Copy, differences: list[Difference]) -> Procedure:
    """Only compare the sources."""
    return _procedure(copy, differences, writes=False)


def _procedure(copy: Copy, differences: list[Difference], writes: bool) -> Procedure:
    found = yield CopyPass(copy, writes)
    differing = sorted({source for span in found if span for source in span})
    if differing and copy.chosen is None:
        differences.append(Difference(copy.name, copy.models[0], tuple(copy.models[at] for at in differing)))


class CopyState(Struct):
    """Indices of the sources that differ from the first one within a span."""

    bad: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=lambda: np.zeros(0, np.int64))
    differing: set[int] = field(default_factory=set)


class CopyPass:
    """Compares all sources byte by byte and copies one of them."""

    def __init__(self, copy: Copy, writes: bool) -> None:
        self._copy, self._writes = copy, writes

    @property
    def writes(self) -> bool:
        return self._writes

    def start(self) -> CopyState:
        return CopyState()

    def read_from(self, state: CopyState, extents: Sequence[Extent]) -> bool:
        """False: the worker reads the bytes."""
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
    """The error for pairs of tensors that must be equal but are not."""
    return MismatchError(f"{what}:\n" + _listed(each.name for each in differences), hint)


def describe_copies(differences: Sequence[Difference]) -> MismatchError:
    """The error for tensors that can only be copied but differ between the models."""
    lines = (
        f"{each.name} of {each.first} is not that of {' and '.join(map(str, each.others))}" for each in differences
    )
    return MismatchError(
        "These tensors cannot be merged, only copied, but they differ:\n" + _listed(lines),
        "Say which model to take them from with --unmerged_from PATH.",
    )


def _listed(lines: Iterable[str]) -> str:
    """The first lines in sorted order, so that the message does not depend on the workers."""
    lines = sorted(lines)
    more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return "\n".join(f"  {line}" for line in [*lines[:MOST_LINES], *more])
