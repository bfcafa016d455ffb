"""The interface between kernels and the run: procedures, passes and spans.

Merging one tensor is a *procedure*: a generator that yields one :class:`Pass` over the tensor after another, and is
sent the findings of each pass's spans. Measuring passes come first, the writing pass comes last. The run decides which
worker processes which span and when; the procedure decides what is computed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from msgspec import Struct

from modelfuse.dtypes import DType, computed_in
from modelfuse.kernels.matrices import Matrices
from modelfuse.methods.applied import Applied

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

#: Memory in bytes that a worker may use for arrays on the CPU, and the elements of a block.
CPU_WORKER_BYTES = 32_000_000
CPU_BLOCK = 1 << 17


class Work(Struct, frozen=True):
    """One tensor to merge.

    Attributes:
        name: Its name in the output; random draws depend on it.
        size: The number of elements.
        sources: The stored types of the sources: the models in order, then the base if there is one.
        has_base: Whether there is a base.
        out: The output type.
        method: The method with its settings.
        deltas: For each model, whether its source is already a difference to the base; empty: none is.
        matrices: How the tensor is split into matrices, for methods of whole matrices.
        shape: The tensor's shape, for methods that use rows or columns; empty: one dimension.
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
        """The compute type, as numpy names it: float32 or float64."""
        return str(computed_in(*self.sources))


class Extent(NamedTuple):
    """A tensor's elements in a file, contiguous and unencoded.

    Attributes:
        descriptor: The open file.
        offset: The byte offset of the first element.
    """

    descriptor: int
    offset: int


class Unread(Exception):
    """Raised by a pass that reads files itself if a read fails.

    Attributes:
        source: The index of the source.
    """

    def __init__(self, source: int) -> None:
        super().__init__(f"source {source} could not be read")
        self.source = source


class SpanState(Protocol):
    """The state of a pass within one span."""

    @property
    def bad(self) -> np.ndarray[Any, Any]:
        """Counts of non-finite elements: int64, one per source, then the output's."""


class Pass(Protocol):
    """One pass over a tensor, slice by slice; its spans may be processed concurrently.

    A pass may have a method ``fold(one, other)``: an exact, order-independent reduction of two spans' findings. The
    scheduler may then fold as spans end, so that at most one finding per worker is held, however large the tensor is;
    the procedure folds what remains. A pass that does not take slices in order says what it takes instead: see
    :func:`steps_of` and :func:`span_of`.
    """

    @property
    def writes(self) -> bool:
        """Whether ``apply`` fills ``out``."""

    def start(self) -> SpanState:
        """Begin a span; returns its state."""

    def read_from(self, state: Any, extents: Sequence[Extent]) -> bool:
        """Let the pass read the sources from files itself, instead of getting the elements in ``apply``.

        Args:
            state: The span's state.
            extents: The extent of each source.

        Returns:
            Whether the pass reads them itself.
        """

    def apply(self, state: Any, first: int, count: int, raws: Bytes, out: Bytes) -> None:
        """Process the elements ``first`` to ``first + count``.

        Args:
            state: The span's state.
            first: The index of the slice's first element in the tensor.
            count: The number of elements in the slice.
            raws: uint8, shape (sources, bytes): each source's stored bytes from column 0 on, or a buffer for them.
            out: uint8, shape (bytes,): the buffer for the encoded result.

        Raises:
            Unread: If the pass reads the sources itself and a read fails.
        """

    def finish(self, state: Any) -> Any:
        """End a span; returns its finding, which is sent to the procedure."""


class PassStep(NamedTuple):
    """Elements that a pass processes in one call of ``apply``.

    Attributes:
        first: The index of the first element.
        size: The number of elements.
        writes: For a writing pass: whether ``out`` then has the result of exactly these elements.
    """

    first: int
    size: int
    writes: bool = True


def steps_of(pass_: Pass, state: Any, first: int, count: int, most: int) -> Iterator[PassStep]:
    """The steps of a pass over a span; the next one is requested once the last one is done.

    By default these are slices of at most ``most`` elements; a pass may have its own method ``steps``.
    """
    own = getattr(pass_, "steps", None)
    if own is not None:
        yield from own(state, first, count, most)
        return
    for start in range(first, first + count, most):
        yield PassStep(start, min(most, first + count - start))


def span_of(pass_: object, span: int) -> int:
    """The number of elements per span: ``span``, unless the pass has an attribute of that name."""
    return getattr(pass_, "span", None) or span


class Measured(NamedTuple):
    """The finding of a pass that was wrapped to measure distances to the base as well.

    Attributes:
        found: The finding of the wrapped pass.
        distances: The measured distances.
    """

    found: Any
    distances: Any


Procedure = Generator[Pass, list[Any], None]
