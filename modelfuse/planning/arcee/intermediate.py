"""The result of one document as a model of another: its tensors are merged while they are read."""

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

#: Elements that are merged at a time; sums are added up in chunks of which this is a multiple.
PIECE = 1 << 18


@dataclass(frozen=True, slots=True)
class MergedTensor(StoredTensor):
    """A tensor that a method makes of others, rounded to its type: what it measures of them is measured once.

    Attributes:
        operation: How it is made.
        recent: Keeps what was measured.
    """

    operation: Operation = field(hash=False)
    recent: Recent = field(compare=False, repr=False)

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """All that it is merged of."""
        return self.operation.sources

    @property
    def held(self) -> int:
        """What all that it is merged of holds."""
        return sum(part.held for part in self.made_of)

    @property
    def reader_bytes(self) -> int:
        """What reading its parts takes, and a piece of each, as it is stored and as numbers."""
        return max(part.reader_bytes for part in self.made_of) + PIECE * 24 * (len(self.made_of) + 2)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open all parts for reading."""
        with ExitStack() as stack:
            merger = _Merger(self.operation, [stack.enter_context(part.open()) for part in self.made_of])
            writing: Pass = self.recent.get(self.name, merger.measure)

            def read(start: int, buffer: Buffer) -> None:
                out, size = np.frombuffer(buffer, np.uint8), self.dtype.bytes
                for first in range(0, out.size // size, PIECE):
                    merger.walk(writing, start + first, out[first * size : (first + PIECE) * size])

            yield read


class _Merger:
    """Drives the passes of one merge over open tensors."""

    def __init__(self, operation: Operation, readers: Sequence[Reader]) -> None:
        self._work, self._readers = operation.work, readers
        self._widest = max(dtype.bytes for dtype in self._work.sources)

    def measure(self) -> Pass:
        """Walk the passes that measure; the one that writes."""
        from modelfuse.kernels.adaptive import numpy_kernel

        procedure, room = numpy_kernel().merge(self._work), np.empty(self._work.out.nbytes(PIECE), np.uint8)
        pass_ = next(procedure)
        while not pass_.writes:
            found = list[object]()
            fold = getattr(pass_, "fold", None)
            for first in range(0, self._work.size, PIECE):
                found.append(self.walk(pass_, first, room[: self._work.out.nbytes(self._work.size - first)]))
                if fold is not None and len(found) > 1:
                    found = [fold(*found)]
            pass_ = procedure.send(found)
        return pass_

    def walk(self, pass_: Pass, first: int, out: Bytes) -> object:
        """One pass over as many elements as there is room for; what it finds."""
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
        donor: The model whose files it gets.
        operations: How its tensors are made.
        config: The content of its config.json.
    """
    recent = Recent(max(4, len(operations) // 16))
    tensors = {each.name: _tensor(each, recent) for each in operations}
    return replace(donor, tensors=tensors, aliases={}, config=config, left_out={}, dequantized=False)


def _tensor(operation: Operation, recent: Recent) -> StoredTensor:
    source = operation.sources[operation.chosen or 0]
    as_it_is = operation.action == "take" and operation.dtype == source.dtype and not source.is_delta
    if operation.action == "copy" or as_it_is:
        return replace(source, name=operation.name)
    return MergedTensor(operation.name, operation.dtype, operation.shape, source.file, 0, operation, recent)
