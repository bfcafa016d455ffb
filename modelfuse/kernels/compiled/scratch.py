"""Per-worker scratch memory and buffers that are reused from span to span, laid out for the kernels once.

Laying out arguments for machine code and allocating memory would take longer than the work on a small tensor.
"""

from __future__ import annotations

import threading
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np

from modelfuse.dtypes import BF16, F16, F32, F64
from modelfuse.kernels import Bytes, Work
from modelfuse.kernels.compiled import merge_loops
from modelfuse.kernels.compiled.direct_reads import BLOCK, DirectReads
from modelfuse.kernels.compiled.line_ranks import LineBuffers
from modelfuse.kernels.jit.code_cache import Prepared, prepare
from modelfuse.kernels.order_statistics import BINS

Array = np.ndarray[Any, Any]

RAW_CODES = {
    F32.name: merge_loops.RAW_F32,
    F64.name: merge_loops.RAW_F64,
    BF16.name: merge_loops.RAW_BF16,
    F16.name: merge_loops.RAW_F16,
}


class TallyTables(NamedTuple):
    """A worker's tally tables, laid out.

    Attributes:
        all: uint64, shape (models, words): zero between spans.
        models: The rows of ``all``.
        numbers: uint64, shape (BINS,): receives the non-empty bins of one model.
        rows: uint64, shape (BINS, 3): receives their counts and sums.
    """

    all: Any
    models: list[Any]
    numbers: Any
    rows: Any


class Scratch:
    """A worker's scratch memory for tensors of one kind.

    Args:
        models: The number of models.
        has_base: Whether there is a base as well.
        compute: float32 or float64.
        keeps: Whether the element step looks up probabilities by rank.
        rows: The number of rows of results.

    Attributes:
        kind: The tuple of the arguments before ``rows``.
        rows: As given.
        buffers: The :class:`modelfuse.kernels.compiled.merge_loops.BlockBuffers`, laid out.
        bad: The counts of non-finite elements.
        files: The files that kernels read from.
    """

    def __init__(self, models: int, has_base: bool, compute: str, keeps: bool, rows: int) -> None:
        self.kind, self.rows = (models, has_base, compute, keeps), rows
        self._lines: Any = None
        self._most_lines = 0, 0
        x, bits = np.zeros((models + 1, BLOCK), compute), np.empty(BLOCK, np.uint64)
        self.bad, self.files = np.zeros(models + has_base + 1, np.int64), DirectReads.of(models + has_base)
        self.buffers: Any = prepare(
            merge_loops.BlockBuffers(
                x,
                x.view(np.uint32),
                x.view(np.uint64),
                np.empty((rows, BLOCK), compute),
                np.zeros(BLOCK, np.float32),
                bits,
                bits.view(np.uint32),
                np.empty((merge_loops.TOGETHER, BLOCK), np.uint16),
                np.empty((merge_loops.TOGETHER, BLOCK), np.uint64),
                self.bad,
                np.empty((models if keeps else 0, BINS), compute),
                np.empty((0, 0), np.uint8),
                self.files,
            )
        )

    def make_marks(self, elements: int) -> None:
        """Make room for the marks of a slice."""
        if self.buffers.value.marks.shape[1] < elements:
            marks = np.empty((self.kind[0], elements), np.uint8)
            self.buffers = prepare(self.buffers.value._replace(marks=marks))

    def line_buffers(self, length: int, group: int) -> Any:
        """The :class:`modelfuse.kernels.compiled.line_ranks.LineBuffers` for such lines, laid out."""
        most = max(self._most_lines[0], length), max(self._most_lines[1], group)
        if most != self._most_lines:
            models, has_base, compute, *_ = self.kind
            self._most_lines = most
            self._lines = prepare(LineBuffers.of(models, models + has_base, compute, *most))
        return self._lines

    @cached_property
    def tables(self) -> TallyTables:
        """The tally tables; allocated on first use."""
        models, _, compute, *_ = self.kind
        tables = np.zeros((models, BINS * (1 if compute == "float32" else 3)), np.uint64)
        numbers, rows = np.empty(BINS, np.uint64), np.empty((BINS, 3), np.uint64)
        return TallyTables(prepare(tables), [prepare(table) for table in tables], prepare(numbers), prepare(rows))


class _Own(threading.local):
    scratch: Scratch | None = None
    stored: Any = None


_own = _Own()


def take_scratch(work: Work, rows: int) -> Scratch:
    """Take the worker's scratch for a span; if the span fails it is not given back, as its tables may be dirty.

    Args:
        work: The tensor.
        rows: The least number of rows of results.
    """
    kind = work.models, work.has_base, work.compute, work.method.chain.looks_up
    scratch, _own.scratch = _own.scratch, None
    if scratch is None or scratch.kind != kind or scratch.rows < rows:
        return Scratch(*kind, rows)
    scratch.bad[:] = 0
    scratch.files.slice[:] = 0
    return scratch


def give_back(scratch: Scratch) -> None:
    """Give the scratch back for the worker's next span."""
    _own.scratch = scratch


def drop_scratch() -> None:
    """Free the scratch of a thread that processes no more spans."""
    _own.scratch = None


def inputs_of(work: Work) -> Any:
    """A tensor's :class:`~modelfuse.kernels.compiled.merge_loops.SourceTypes`, laid out; many tensors share one."""
    return _inputs(tuple([source.name for source in work.sources]), work.models, work.has_base, work.deltas)


@cache
def _inputs(names: tuple[str, ...], models: int, has_base: bool, deltas: tuple[bool, ...]) -> Prepared:
    codes = np.array([RAW_CODES[name] for name in names], np.int64)
    return prepare(merge_loops.SourceTypes(codes, models, has_base, np.array(deltas or (False,) * models, np.bool_)))


def lay_out(inputs: Any, raws: Bytes, out: Bytes) -> Any:
    """The worker's buffers as :class:`~modelfuse.kernels.compiled.merge_loops.Stored`; cached for the last slice."""
    last = _own.stored
    same = last is not None and last.value.raws is raws and last.value.out is out
    if not same or last.value.inputs is not inputs.value:
        halves, out_halves = raws.view(np.uint16), out[: out.size & -2].view(np.uint16)
        _own.stored = last = prepare(merge_loops.Stored(inputs, raws, halves, out, out_halves))
    return last
