"""Batches of spans for Ray tasks: large enough to amortize a task's overhead, small enough to balance the load."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from modelfuse.execution.ray.messages import PassSpans
from modelfuse.execution.scheduler import Queue, Span
from modelfuse.execution.worker import Task
from modelfuse.kernels import Pass

#: The most bytes that a batch reads and writes: about a second on a network filesystem, far less on a local disk.
MOST_BYTES = 256_000_000
#: The same limit where nodes send their output to the driver.
MOST_SENT = 64_000_000
#: The most bytes of pickled passes in a batch: the tables of small tensors are larger than the tensors.
MOST_PASSES = 8_000_000
#: The least number of batches per processor.
LEAST_BATCHES = 4


@dataclass
class Batch:
    """Spans that are processed by one Ray task.

    Attributes:
        spans: The spans, grouped by pass, in the order in which they left the queue.
        nbytes: Bytes that they read and write.
        attempts: How often the batch was submitted.
    """

    spans: list[list[Span[Pass]]] = field(default_factory=list)
    nbytes: int = 0
    attempts: int = 0

    @property
    def names(self) -> list[str]:
        """The names of their tensors."""
        tasks: list[Task] = [own[0].job.owner for own in self.spans]
        return list(dict.fromkeys((task.tensor or task.sources[0]).name for task in tasks))

    def parts(self, numbers: Mapping[Task, int]) -> list[PassSpans]:
        """The spans as they are sent to a node."""
        return [
            PassSpans(numbers[own[0].job.owner], own[0].pass_, [(span.first, span.count) for span in own])
            for own in self.spans
        ]


class Batcher:
    """Builds batches of the spans in a queue.

    Args:
        queue: The queue.
        has: Whether a span was already written by an earlier run.
    """

    def __init__(self, queue: Queue[Pass], has: Callable[[Span[Pass]], bool]) -> None:
        self._queue, self._has = queue, has

    def next(self, limit: int) -> Batch | None:
        """The next batch, of about ``limit`` bytes; None if no span is ready."""
        batch, passes = Batch(), 0
        for span in self._spans():
            if batch.spans and batch.spans[-1][0].pass_ is span.pass_:
                batch.spans[-1].append(span)
            else:
                batch.spans.append([span])
                passes += _size_of(span.pass_)
            nbytes = _bytes_of(span)
            batch.nbytes += nbytes
            # Assumes that the next span is as large as this one.
            if batch.nbytes + nbytes > limit or passes > MOST_PASSES:
                break
        return batch if batch.spans else None

    def _spans(self) -> Iterator[Span[Pass]]:
        while (span := self._queue.take(wait=False)) is not None:
            if self._has(span):
                self._queue.done((span,), (None,))
            else:
                yield span


def batch_bytes(nbytes: int, processors: int, sent: bool) -> int:
    """The size limit of a batch in bytes.

    Args:
        nbytes: Bytes that are read and written in all.
        processors: The number of processors of the cluster.
        sent: Whether nodes send their output to the driver.
    """
    most = MOST_SENT if sent else MOST_BYTES
    return min(most, nbytes // (LEAST_BATCHES * max(processors, 1)))


def _bytes_of(span: Span[Pass]) -> int:
    task: Task = span.job.owner
    read = sum(source.stored.nbytes(span.count) for source in task.sources)
    return read + (task.tensor.dtype.nbytes(span.count) if task.tensor is not None and span.pass_.writes else 0)


def _size_of(pass_: Pass) -> int:
    return len(pickle.dumps(pass_, 5))
