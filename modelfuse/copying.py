"""Tensors that are not merged: integers and other types without arithmetic, and second names of tied weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modelfuse.errors import MismatchError
from modelfuse.kernels import Bytes, Procedure

#: Differing tensors that an error lists.
MOST_LINES = 20


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor whose sources are not equal: its name, and the positions of the sources that differ from the first."""

    name: str
    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor to copy.

    Attributes:
        name: Its name.
        chosen: The source to take where they differ; None: they must not differ.
        itemsize: Bytes an element.
    """

    name: str
    chosen: int | None
    itemsize: int


def copy_procedure(copy: Copy, differences: list[Difference]) -> Procedure:
    """Write one source, after comparing it with the others; adds to ``differences`` where they differ."""
    return _procedure(copy, differences, writes=True)


def compare_procedure(copy: Copy, differences: list[Difference]) -> Procedure:
    """Only compare the sources."""
    return _procedure(copy, differences, writes=False)


def _procedure(copy: Copy, differences: list[Difference], writes: bool) -> Procedure:
    found = yield CopyPass(copy, writes)
    differing = sorted({source for span in found for source in span})
    if differing and copy.chosen is None:
        differences.append(Difference(copy.name, tuple(differing)))


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

    def apply(self, state: CopyState, first: int, count: int, raws: Bytes, out: Bytes) -> None:
        nbytes = count * self._copy.itemsize
        for row in range(1, len(raws)):
            if not np.array_equal(raws[0, :nbytes], raws[row, :nbytes]):
                state.differing.add(row)
        if self._writes:
            out[:nbytes] = raws[self._copy.chosen or 0, :nbytes]

    def finish(self, state: CopyState) -> set[int]:
        return state.differing


def describe_untied(differences: Sequence[Difference]) -> MismatchError:
    """The error of models in which tensors that config.json ties are not equal."""
    return MismatchError(
        "config.json ties these tensors, but their values differ:\n" + _listed(each.name for each in differences),
        "Set tie_word_embeddings to false there if they are meant to differ.",
    )


def describe_differences(differences: Sequence[Difference], models: Sequence[Path]) -> MismatchError:
    """The error of tensors to copy that differ, and no model was chosen to take them from."""
    lines = (
        f"{each.name} of {models[0]} is not that of {' and '.join(str(models[at]) for at in each.sources)}"
        for each in differences
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
