"""A worker: reads spans of tensors slice by slice, runs passes over them and writes the results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

import numpy as np
from msgspec import Struct

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.tensors import PlainReader, Reader
from modelfuse.errors import CheckpointError
from modelfuse.execution.report_writer import Counts, SpanResult
from modelfuse.kernels import Bytes, Extent, Measured, Pass, Unread, span_of, steps_of
from modelfuse.kernels.kernel import Kernel
from modelfuse.planning.memory_budget import SPAN
from modelfuse.planning.operations import Operation
from modelfuse.planning.plan import Plan
from modelfuse.storage import PathOrUrl
from modelfuse.storage.checksums import Checksum

#: Rows of the slice buffer start at multiples of a cache line.
ROW_ALIGNMENT = 64
#: Writes bytes of a tensor, given the index of their first element.
Write = Callable[[Operation, int, Bytes], None]


class Task(Struct, eq=False):
    """The inputs and the output of a job.

    Attributes:
        sources: The tensors to read.
        models: The inputs that contain them.
        tensor: The output tensor; None if the sources are only compared.
        strict: Whether non-finite values are an error.
        begun: The number of leading elements that workers have begun to read.
    """

    sources: tuple[StoredTensor, ...]
    models: tuple[PathOrUrl, ...]
    tensor: Operation | None = None
    strict: bool = False
    begun: int = 0

    @property
    def window(self) -> int:
        """The most elements that one step of a pass takes, if that is more than a slice; else 0."""
        return self.tensor.window if self.tensor is not None else 0


class Tasks(NamedTuple):
    """All tasks of a plan.

    Attributes:
        equal_pairs: One comparison per pair of tensors that must be equal.
        tensors: One task per output tensor.
    """

    equal_pairs: tuple[Task, ...]
    tensors: tuple[Task, ...]

    @classmethod
    def of(cls, plan: Plan) -> Tasks:
        """The tasks of a plan."""
        strict = plan.recipe.on_nonfinite == "error"
        equal_pairs = tuple(Task((pair.one, pair.other), (pair.path, pair.path)) for pair in plan.equal_pairs)
        tensors, known = [], dict[tuple[PathOrUrl, ...], tuple[PathOrUrl, ...]]()
        for tensor in plan.tensors:
            models = tuple(model.path for model in plan.inputs_of(tensor))
            models = known.setdefault(models, models)
            tensors.append(Task(tensor.sources, models, tensor, strict and tensor.action != "copy"))
        return cls(equal_pairs, tuple(tensors))


class ResultSink(Protocol):
    """Receives the results of spans."""

    def has(self, task: Task, pass_: Pass, first: int, count: int) -> bool:
        """Whether an earlier run has already written this span."""

    def may_go_ahead(self) -> bool:
        """Whether spans of later tensors may start before the current tensor has ended."""

    def write(self, tensor: Operation, start: int, data: Bytes) -> None:
        """Write bytes of a tensor, starting at element ``start``; they count as progress."""

    def advance(self, tensor: Operation, count: int) -> None:
        """Count progress for elements that were written by another process."""

    def take(self, task: Task, pass_: Pass, first: int, count: int, walked: SpanResult) -> None:
        """Receive the result of a span whose bytes were written."""


class BufferSizes(NamedTuple):
    """Sizes of a worker's buffers and of the range cache that all workers share.

    Attributes:
        slice_elements: Elements per slice.
        rows: Bytes of the input buffer: the largest slice of all sources together.
        out: Bytes of the output buffer: the largest slice of a result.
        fetched: Capacity in bytes of the cache for ranges of remote files.
        keeps: Whether ranges stay cached after they were read, because they are read again.
    """

    slice_elements: int
    rows: int
    out: int
    fetched: int
    keeps: bool

    @classmethod
    def of(cls, plan: Plan) -> BufferSizes:
        """The sizes for a plan."""
        slices = plan.slice_elements
        pairs = [((pair.one, pair.other), slices) for pair in plan.equal_pairs if pair.one.size]
        everything = [*((tensor.sources, max(slices, tensor.window)) for tensor in plan.tensors), *pairs]
        rows = max(row_bytes(sources, elements) * len(sources) for sources, elements in everything)
        out = max(tensor.dtype.nbytes(min(max(slices, tensor.window), tensor.size)) for tensor in plan.tensors)
        return cls(slices, rows, out, plan.fetched, plan.reads_twice)


class Stopped(Exception):
    """Raised in a worker that must stop because another one has failed."""


class Worker:
    """Processes spans, with buffers of its own.

    Args:
        kernel: The kernel that allocates the buffers.
        sizes: The sizes of the buffers.
        stopping: Whether to stop; called before every slice.
    """

    def __init__(self, kernel: Kernel, sizes: BufferSizes, stopping: Callable[[], bool] = lambda: False) -> None:
        self._slice_elements, self._stopping = sizes.slice_elements, stopping
        self._raws, self._out = kernel.buffer((sizes.rows,)), kernel.buffer((sizes.out,))
        self._last_rows = self._raws.reshape(1, -1)
        #: The slice in the buffers: a tensor of a single slice is read only once for all of its passes.
        self._held: tuple[Task, int, int] | None = None

    def walk(self, task: Task, pass_: Pass, first: int, count: int, write: Write) -> SpanResult:
        """Read each slice of all sources, run the pass on it and write its result.

        Raises:
            CheckpointError: If an input cannot be read, or has non-finite values where the task is strict.
            Stopped: If ``stopping`` returned True.
        """
        state, tensor = pass_.start(), task.tensor if pass_.writes else None
        nbytes = (tensor or task.sources[0]).dtype.nbytes
        checksum = Checksum(nbytes(count) if tensor else 0)
        for start, length in self._apply(task, pass_, state, first, count):
            if tensor is not None:
                data = self._out[: nbytes(length)]
                checksum.update(nbytes(start - first), data)
                write(tensor, start, data)
        if task.strict and task.tensor is not None and state.bad.any():
            raise nonfinite(task.tensor, task.models, self._count_bad(task, pass_))
        found, distances = pass_.finish(state), None
        if isinstance(found, Measured):
            found, distances = found
        if tensor is None:
            return SpanResult(found)
        facts = {key: value for source in task.sources for key, value in source.facts.items()}
        return SpanResult(found, state.bad, checksum.digests, distances, facts)

    def _apply(self, task: Task, pass_: Pass, state: Any, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Run a pass over the slices of a span; yields (first element, number of elements) of each slice to write."""
        rows = self._rows(task)
        with ExitStack() as files:
            readers = [files.enter_context(source.open()) for source in task.sources]
            reads_itself = self._reads_itself(pass_, state, readers)
            for source in task.sources if self._held is None or self._held[:2] != (task, first) else ():
                source.expect(first, count)
            filled = [
                (reader, source.dtype.nbytes, row)
                for reader, source, row in zip(readers, task.sources, rows, strict=True)
            ]
            for start, length, writes in steps_of(pass_, state, first, count, self._slice_elements):
                if self._stopping():
                    raise Stopped
                if reads_itself:
                    self._held = None
                elif self._held != (task, start, length):
                    self._held = None
                    for read, nbytes, row in filled:
                        read(start, row[: nbytes(length)].data)
                    self._held = task, start, length
                try:
                    pass_.apply(state, start, length, rows, self._out)
                except Unread as unread:
                    read, nbytes, row = filled[unread.source]
                    read(start, row[: nbytes(length)].data)  # Raises the actual error.
                    raise _lost(task.sources[unread.source]) from unread
                if writes:
                    yield start, length

    def _reads_itself(self, pass_: Pass, state: Any, readers: Sequence[Reader]) -> bool:
        """Let the pass read the files itself, if all sources are stored as they are read and it is able to."""
        plain = [each for each in readers if type(each) is PlainReader and each.file.descriptor >= 0]
        extents = [Extent(each.file.descriptor, each.offset) for each in plain]
        return len(plain) == len(readers) and pass_.read_from(state, extents)

    def _rows(self, task: Task) -> Bytes:
        """The input buffer as one row per source. An unchanged array is reused: kernels cache its layout."""
        shape = len(task.sources), row_bytes(task.sources, max(self._slice_elements, task.window))
        if self._last_rows.shape != shape:
            self._last_rows = self._raws[: math.prod(shape)].reshape(shape)
        return self._last_rows

    def _count_bad(self, task: Task, pass_: Pass) -> Counts:
        """Count the non-finite elements of the whole tensor, for the error message."""
        size, bad = task.sources[0].size, []
        for first in range(0, size, span := span_of(pass_, SPAN)):
            state = pass_.start()
            for _ in self._apply(task, pass_, state, first, min(span, size - first)):
                pass
            bad.append(state.bad.copy())
            pass_.finish(state)
        counts: Counts = np.sum(bad, axis=0)
        return counts


def _lost(source: StoredTensor) -> CheckpointError:
    message = f"{source.file.path}: reading {source.name} failed"
    return CheckpointError(message, "Merge again; if it fails again, check the disk.")


def row_bytes(sources: Sequence[StoredTensor], slice_elements: int) -> int:
    """Bytes of a row of the input buffer: a slice of the widest source, rounded up to ROW_ALIGNMENT."""
    elements = min(slice_elements, max(source.size for source in sources))
    return -(-elements * max(source.dtype.bytes for source in sources) // ROW_ALIGNMENT) * ROW_ALIGNMENT


def nonfinite(
    tensor: Operation, models: Sequence[PathOrUrl], bad: np.ndarray[Any, np.dtype[np.int64]]
) -> CheckpointError:
    """The error for non-finite values: it names the tensor, the models and the counts, or an overflow of the result.

    Args:
        tensor: The operation.
        models: The inputs of its sources.
        bad: int64, shape (sources + 1,): counts over the whole tensor; the last is the result's.
    """
    name, size = tensor.name, tensor.size
    holders = [f"{count:,} in {path}" for path, count in zip(models, bad[:-1], strict=True) if count]
    if holders:
        return CheckpointError(
            f"Tensor {name!r} holds NaN or infinite values: {' and '.join(holders)}, of {size:,} elements",
            "Use --on_nonfinite propagate to let such values through.",
        )
    return CheckpointError(
        f"The merged tensor {name!r} overflows its output dtype {tensor.dtype} in {bad[-1]:,} of {size:,} elements",
        "Use a wider --output_dtype, or --on_nonfinite propagate to store infinities.",
    )
