"""One worker: spans of tensors are read, worked on and given away, slice by slice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.tensors import PlainReader, Reader
from modelfuse.errors import CheckpointError
from modelfuse.execution.report_writer import Counts, SpanResult
from modelfuse.kernels import Bytes, Extent, Measured, Pass, Unread, span_of, steps_of
from modelfuse.kernels.kernel import Kernel
from modelfuse.planning.memory_budget import SPAN
from modelfuse.planning.operations import Operation
from modelfuse.planning.plan import Plan
from modelfuse.storage import Place
from modelfuse.storage.checksums import Checksum

#: Rows of a slice start at multiples of a cache line.
ROW_ALIGNMENT = 64
#: Takes a tensor's bytes from an element on.
Write = Callable[[Operation, int, Bytes], None]


@dataclass(eq=False, slots=True)
class Task:
    """What a worker needs to know of a job.

    Attributes:
        sources: The tensors to read.
        models: The inputs that they are in.
        tensor: The one to make of them; None if they are only compared.
        strict: Whether values that are not finite end the merge.
        begun: How many elements workers have begun to read at least once, from the first on.
    """

    sources: tuple[StoredTensor, ...]
    models: tuple[Place, ...]
    tensor: Operation | None = None
    strict: bool = False
    begun: int = 0

    @property
    def window(self) -> int:
        """The most elements that a pass is given together, where that is no slice."""
        return self.tensor.window if self.tensor is not None else 0


class Tasks(NamedTuple):
    """All tasks of a plan.

    Attributes:
        equal_pairs: A comparison for each of its equal pairs.
        tensors: One for each of its tensors.
    """

    equal_pairs: tuple[Task, ...]
    tensors: tuple[Task, ...]

    @classmethod
    def of(cls, plan: Plan) -> Tasks:
        """What is to be done for a plan."""
        strict = plan.recipe.on_nonfinite == "error"
        equal_pairs = tuple(Task((pair.one, pair.other), (pair.path, pair.path)) for pair in plan.equal_pairs)
        tensors, known = [], dict[tuple[Place, ...], tuple[Place, ...]]()
        for tensor in plan.tensors:
            models = tuple(model.path for model in plan.inputs_of(tensor))
            models = known.setdefault(models, models)
            tensors.append(Task(tensor.sources, models, tensor, strict and tensor.action != "copy"))
        return cls(equal_pairs, tuple(tensors))


class ResultSink(Protocol):
    """Whom spans are walked for."""

    def has(self, task: Task, pass_: Pass, first: int, count: int) -> bool:
        """Whether there is nothing to do, as an earlier run has written the span."""

    def may_go_ahead(self) -> bool:
        """Whether spans may be walked of tensors that come after one that has not ended."""

    def write(self, tensor: Operation, start: int, data: Bytes) -> None:
        """Write a tensor's bytes from an element on; they count as progress."""

    def advance(self, tensor: Operation, count: int) -> None:
        """So many elements were written otherwise."""

    def take(self, task: Task, pass_: Pass, first: int, count: int, walked: SpanResult) -> None:
        """Take what walking a span has come to, once its bytes are written."""


class BufferSizes(NamedTuple):
    """How large the buffers of a worker are.

    Attributes:
        slice_elements: Elements to hold at a time.
        rows: Bytes of the largest slice of all sources.
        out: Bytes of the largest slice of the result.
        fetched: Bytes of files in stores to hold, of all workers together.
        keeps: Whether those that were read are to be kept, as they will be read again.
    """

    slice_elements: int
    rows: int
    out: int
    fetched: int
    keeps: bool

    @classmethod
    def of(cls, plan: Plan) -> BufferSizes:
        """What the tensors of a plan need."""
        slices = plan.slice_elements
        pairs = [((pair.one, pair.other), slices) for pair in plan.equal_pairs if pair.one.size]
        everything = [*((tensor.sources, max(slices, tensor.window)) for tensor in plan.tensors), *pairs]
        rows = max(row_bytes(sources, elements) * len(sources) for sources, elements in everything)
        out = max(tensor.dtype.nbytes(min(max(slices, tensor.window), tensor.size)) for tensor in plan.tensors)
        return cls(slices, rows, out, plan.fetched, plan.reads_twice)


class Stopped(Exception):
    """Raised in a worker that is not to go on, because another one has failed."""


class Worker:
    """A worker's buffers, and what it does to a span.

    Args:
        kernel: What merges.
        sizes: What the buffers are to hold.
        stopping: Whether to give up; asked before every slice.
    """

    def __init__(self, kernel: Kernel, sizes: BufferSizes, stopping: Callable[[], bool] = lambda: False) -> None:
        self._slice_elements, self._stopping = sizes.slice_elements, stopping
        self._raws, self._out = kernel.buffer((sizes.rows,)), kernel.buffer((sizes.out,))
        self._last_rows = self._raws.reshape(1, -1)
        #: What the buffers hold: a tensor of one slice is read once, however many passes walk it.
        self._held: tuple[Task, int, int] | None = None

    def walk(self, task: Task, pass_: Pass, first: int, count: int, write: Write) -> SpanResult:
        """Read each slice of every source, let the pass work on it, give away what it made.

        Raises:
            CheckpointError: If an input cannot be read, or holds values that are not finite.
            Stopped: If it was told to give up.
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
        """The slices of a span, first element and number of elements, each once the pass has worked on it."""
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
                    read(start, row[: nbytes(length)].data)  # Whatever is wrong is told.
                    raise _lost(task.sources[unread.source]) from unread
                if writes:
                    yield start, length

    def _reads_itself(self, pass_: Pass, state: Any, readers: Sequence[Reader]) -> bool:
        """Have the pass read what lies in files as it is."""
        plain = [each for each in readers if type(each) is PlainReader and each.file.descriptor >= 0]
        extents = [Extent(each.file.descriptor, each.offset) for each in plain]
        return len(plain) == len(readers) and pass_.read_from(state, extents)

    def _rows(self, task: Task) -> Bytes:
        """The buffer as the rows of a task's sources. Often they are the last one's, which kernels know already."""
        shape = len(task.sources), row_bytes(task.sources, max(self._slice_elements, task.window))
        if self._last_rows.shape != shape:
            self._last_rows = self._raws[: math.prod(shape)].reshape(shape)
        return self._last_rows

    def _count_bad(self, task: Task, pass_: Pass) -> Counts:
        """All elements that are not finite, one of which was found: what is wrong is to be told with its size."""
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
    message = f"{source.file.path}: reading {source.name} has failed once"
    return CheckpointError(message, "Merge again; if it fails again, look at the disk.")


def row_bytes(sources: Sequence[StoredTensor], slice_elements: int) -> int:
    """The bytes of a slice of any of a tensor's sources, up to a multiple of the widest element's."""
    elements = min(slice_elements, max(source.size for source in sources))
    return -(-elements * max(source.dtype.bytes for source in sources) // ROW_ALIGNMENT) * ROW_ALIGNMENT


def nonfinite(tensor: Operation, models: Sequence[Place], bad: np.ndarray[Any, np.dtype[np.int64]]) -> CheckpointError:
    """Name the tensor, the models that hold such values, and how many; or that only the result is not finite.

    Args:
        tensor: The one that was to be merged.
        models: Whose its sources are.
        bad: int64, shape (sources + 1,): counts over the whole tensor, the last one of the result.
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
