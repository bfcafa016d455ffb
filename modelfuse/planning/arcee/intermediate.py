"""The result of one document as an input of another: a checkpoint whose tensors are merged when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.checkpoints.adapters.arrays import Recent
from modelfuse.checkpoints.tensors import Reader
from modelfuse.kernels import Bytes, Pass
from modelfuse.planning.operations import Operation
from modelfuse.storage.files import Buffer

#: Elements that are merged at a time; a multiple of the chunks of sums.
PIECE = 1 << 18


@dataclass(frozen=True, slots=True)
class MergedTensor(StoredTensor):
    """A tensor that is merged when it is read, rounded to its dtype. What its method measures is measured once.

    Attributes:
        operation: Its operation.
        recent: Cache of writing passes, which contain what was measured.
    """

    operation: Operation = field(hash=False)
    recent: Recent = field(compare=False, repr=False)

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """The sources of the merge."""
        return self.operation.sources

    @property
    def held(self) -> int:
        """Bytes that its sources keep in memory."""
        return sum(part.held for part in self.made_of)

    @property
    def reader_bytes(self) -> int:
        """Bytes of its sources' readers, and of a piece of each source in its stored dtype and in float64."""
        return max(part.reader_bytes for part in self.made_of) + PIECE * 24 * (len(self.made_of) + 2)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open all sources for reading."""
        with ExitStack() as stack:
            merger = _Merger(self.operation, [stack.enter_context(part.open()) for part in self.made_of])
            writing: Pass = self.recent.get(self.name, merger.measure)

            def read(start: int, buffer: Buffer) -> None:
                out, size = np.frombuffer(buffer, np.uint8), self.dtype.bytes
                for first in range(0, out.size // size, PIECE):
                    merger.run(writing, start + first, out[first * size : (first + PIECE) * size])

            yield read


class _Merger:
    """Runs the passes of one merge over open tensors."""

    def __init__(self, operation: Operation, readers: Sequence[Reader]) -> None:
        self._work, self._readers = operation.work, readers
        self._widest = max(dtype.bytes for dtype in self._work.sources)

    def measure(self) -> Pass:
        """Run the measuring passes, and return the writing pass."""
        from modelfuse.kernels.adaptive import numpy_kernel

        procedure, buffer = numpy_kernel().merge(self._work), np.empty(self._work.out.nbytes(PIECE), np.uint8)
        pass_ = next(procedure)
        while not pass_.writes:
            found = list[object]()
            fold = getattr(pass_, "fold", None)
            for first in range(0, self._work.size, PIECE):
                found.append(self.run(pass_, first, buffer[: self._work.out.nbytes(self._work.size - first)]))
                if fold is not None and len(found) > 1:
                    found = [fold(*found)]
            pass_ = procedure.send(found)
        return pass_

    def run(self, pass_: Pass, first: int, out: Bytes) -> object:
        """Run a pass over as many elements as fit into ``out``, from ``first`` on; returns its finding."""
        count = out.size // self._work.out.bytes
        raws = np.empty((len(self._readers), count * self._widest), np.uint8)
        for raw, reader, dtype in zip(raws, self._readers, self._work.sources, strict=True):
            reader(first, raw[: dtype.nbytes(count)].data)
        state = pass_.start()
        pass_.apply(state, first, count, raws, out)
        return pass_.finish(state)


def intermediate(donor: Checkpoint, operations: Sequence[Operation], config: Mapping[str, object]) -> Checkpoint:
    """The result of a document as a checkpoint.

    Args:
        donor: The model whose files the result gets.
        operations: Its operations.
        config: The content of its config.json.
    """
    recent = Recent(max(4, len(operations) // 16))
    tensors = {each.name: _tensor(each, recent) for each in operations}
    return replace(donor, tensors=tensors, aliases={}, config=config, left_out={}, dequantized=False)


def _tensor(operation: Operation, recent: Recent) -> StoredTensor:
    source = operation.sources[operation.chosen or 0]
    unchanged = operation.action == "take" and operation.dtype == source.dtype and not source.is_delta
    if operation.action == "copy" or unchanged:
        return replace(source, name=operation.name)
    return MergedTensor(operation.name, operation.dtype, operation.shape, source.file, 0, operation, recent)
