"""How a kernel and the run meet.

Merging one tensor is a *procedure*: a generator that yields :class:`Pass` after Pass over the tensor
and is sent back, for each, what the passes over its spans found. Passes that measure come first, the
one that writes comes last. The run decides which worker walks which span when; the procedure decides
what is done.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from modelfuse.dtypes import DType, computed_in
from modelfuse.kernels.matrices import Matrices
from modelfuse.methods.applied import Applied

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

#: What a worker may hold at a time of the CPU's memory, and in blocks of how many elements.
CPU_WORKER_BYTES = 32_000_000
CPU_BLOCK = 1 << 17


@dataclass(frozen=True, slots=True)
class Work:
    """One tensor to merge.

    Attributes:
        name: Its name in the output, which the random draws depend on.
        size: The number of elements.
        sources: The storage types of the models in order, the base's last if there is one.
        has_base: Whether there is one.
        out: The type to store.
        method: What to do.
        deltas: Which models are differences to the base already, one a model; empty: none.
        matrices: How it is cut into matrices, if the method works on whole ones.
        shape: The tensor's shape, for methods that look at rows or columns; empty: one dimension.
    """

    name: str
    size: int
    sources: tuple[DType, ...]
    has_base: bool
    out: DType
    method: Applied
    deltas: tuple[bool, ...] = ()
    matrices: Matrices | None = None
    shape: tuple[int, ...] = ()

    @property
    def models(self) -> int:
        """The number of models, without the base."""
        return len(self.sources) - self.has_base

    @property
    def compute(self) -> str:
        """numpy's name of the type that arithmetic runs in."""
        return str(computed_in(*self.sources))


class Extent(NamedTuple):
    """Where a tensor's elements lie as they are, one after another.

    Attributes:
        descriptor: The open file.
        offset: Where they begin in it.
    """

    descriptor: int
    offset: int


class Unread(Exception):
    """Raised by a pass that reads by itself and could not.

    Attributes:
        source: The number of the source.
    """

    def __init__(self, source: int) -> None:
        super().__init__(f"source {source} could not be read")
        self.source = source


class SpanState(Protocol):
    """What a pass carries from slice to slice of a span."""

    @property
    def bad(self) -> np.ndarray[Any, Any]:
        """int64, counts of non-finite elements: one a source, the last one for the output."""


class Pass(Protocol):
    """One walk over a tensor, slice by slice; the spans of a tensor may be walked at the same time.

    A pass may have a method ``fold(one, other)`` that makes one of what two spans found, in any order and exactly.
    Whoever drives it may fold as spans end, so that however large the tensor is, only one such finding a worker is
    kept; the procedure folds what it is sent. A pass that needs more than slices in their order may say what it needs:
    see :func:`steps_of` and :func:`span_of`.
    """

    @property
    def writes(self) -> bool:
        """Whether ``apply`` fills ``out``."""

    def start(self) -> SpanState:
        """Begin a span."""

    def read_from(self, state: Any, extents: Sequence[Extent]) -> bool:
        """Read the sources from there, if the pass can, whose elements would else be given to ``apply``.

        Args:
            state: What ``start`` gave.
            extents: Where each source's elements lie.

        Returns:
            Whether it does.
        """

    def apply(self, state: Any, first: int, count: int, raws: Bytes, out: Bytes) -> None:
        """Work on the elements ``first`` to ``first + count``.

        Args:
            state: What ``start`` gave.
            first: The number of the slice's first element in the tensor.
            count: The number of elements in the slice.
            raws: uint8, shape (sources, bytes): each source's stored bytes from column 0 on, or room for them.
            out: uint8, shape (bytes,): room for the stored result.

        Raises:
            Unread: If it reads by itself, and something could not be read.
        """

    def finish(self, state: Any) -> Any:
        """End a span: what the procedure is to be sent."""


class Step(NamedTuple):
    """Elements that a pass is given together.

    Attributes:
        first: The number of the first one.
        size: How many.
        writes: Of a pass that writes: whether the result of just these elements is there afterwards.
    """

    first: int
    size: int
    writes: bool = True


def steps_of(pass_: Pass, state: Any, first: int, count: int, most: int) -> Iterator[Step]:
    """What a pass is to be given in a span, one step after the other; each is taken once the last one is done.

    That is all elements in slices of ``most``, unless the pass has a method ``steps`` of these parameters.
    """
    own = getattr(pass_, "steps", None)
    if own is not None:
        yield from own(state, first, count, most)
        return
    for start in range(first, first + count, most):
        yield Step(start, min(most, first + count - start))


def span_of(pass_: object, span: int) -> int:
    """How many elements a worker is to walk at a time: ``span``, unless the pass has an attribute of that name."""
    return getattr(pass_, "span", None) or span


class Measured(NamedTuple):
    """What a pass finds that was wrapped in one that measures.

    Attributes:
        found: What the pass itself has found.
        distances: What was measured in passing.
    """

    found: Any
    distances: Any


Procedure = Generator[Pass, list[Any], None]
