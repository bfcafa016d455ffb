"""The driver of a merge on a Ray cluster: submits batches of spans and collects their results."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from modelfuse.execution.ray import node
from modelfuse.execution.ray.batches import Batch, Batcher, batch_bytes
from modelfuse.execution.ray.connect import reached
from modelfuse.execution.ray.messages import Done, Failed, Shipment, is_final, pack, unpack
from modelfuse.execution.ray.node_checks import LOOK, ClusterMonitor, look_at_all, lost
from modelfuse.execution.scheduler import Job, Queue
from modelfuse.execution.worker import BufferSizes, ResultSink, Task
from modelfuse.kernels import Pass
from modelfuse.kernels.backends import Device
from modelfuse.version import __version__

#: Batches in flight per processor: one that is running, one that is queued.
QUEUED = 2
#: Seconds to wait before each attempt of a batch; their number is the number of attempts.
PAUSES = (0.0, 1.0, 3.0)


class Cluster:
    """Processes spans on a Ray cluster.

    Args:
        limit: Seconds to wait while the cluster has no processor.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._walk = ray.remote(num_cpus=1, max_retries=0)(node.walk)
        self._monitor = ClusterMonitor()

    @classmethod
    @contextmanager
    def reached(cls, address: str | None, limit: float) -> Iterator[Cluster]:
        """Connect to a cluster for the duration of the context.

        Raises:
            ClusterError: If it cannot be reached in time.
        """
        with reached(address, limit):
            yield cls(limit)

    @contextmanager
    def sharing(
        self, tasks: Sequence[Task], device: Device, sizes: BufferSizes, nbytes: int, folder: Path | None
    ) -> Iterator[None]:
        """Share what all nodes need, for the duration of the context.

        Args:
            tasks: All tasks.
            device: The device to compute on.
            sizes: The sizes of a worker's buffers.
            nbytes: Bytes that are read and written in all.
            folder: The folder that nodes write to; None: the driver writes all output, if there is any.

        Raises:
            ClusterError: If a node cannot take part.
            CheckpointError: If an input has changed by the end of the merge.
        """
        self._nbytes, self._sends = nbytes, folder is None
        self._numbers = {task: number for number, task in enumerate(tasks)}
        token = f".{secrets.token_hex(8)}"
        shipment = ray.put(pack(Shipment(folder, token, device, sizes, tuple(tasks))))
        self._common = __version__, token, shipment
        try:
            if folder is not None:
                (folder / token).touch()
            while not self._monitor.processors(self._limit):
                time.sleep(LOOK)
            look_at_all(self._common)
            yield
            node.check_inputs(tasks)  # Includes inodes, which nodes cannot compare.
        finally:
            if folder is not None:
                with contextlib.suppress(OSError):
                    (folder / token).unlink()

    def walk(self, jobs: Iterable[Job[Pass]], span: int, receiver: ResultSink) -> None:
        """Process the spans of all jobs.

        Raises:
            ClusterError: If the cluster fails.
            Exception: The error of a span that was not retried, or failed too often.
        """
        queue: Queue[Pass] = Queue(jobs, span, receiver.may_go_ahead)
        batcher = Batcher(queue, lambda each: receiver.has(each.job.owner, each.pass_, each.first, each.count))
        flying: dict[Any, Batch] = {}
        try:
            while True:
                processors = self._monitor.processors(self._limit)
                while len(flying) < QUEUED * max(processors, 1):
                    batch = batcher.next(batch_bytes(self._nbytes, processors, self._sends))
                    if batch is None:
                        break
                    flying[self._send(batch)] = batch
                if not flying:
                    return
                for reference in _landed(list(flying)):
                    batch = flying.pop(reference)
                    failure = self._collect(reference, batch, queue, receiver)
                    if failure is not None:
                        flying[self._again(batch, failure)] = batch
        finally:
            for reference in flying:
                with contextlib.suppress(RayError):
                    ray.cancel(reference, force=True)

    def _send(self, batch: Batch) -> Any:
        pause, batch.attempts = PAUSES[batch.attempts], batch.attempts + 1
        return self._walk.remote(*self._common, pack(batch.parts(self._numbers)), pause)

    def _again(self, batch: Batch, failure: Exception) -> Any:
        """Submit a failed batch again, at most ``len(PAUSES)`` times in all; Ray picks another node if one is lost."""
        if batch.attempts == len(PAUSES):
            failure.add_note(f"This was tried {batch.attempts} times.")
            raise failure
        return self._send(batch)

    def _collect(self, reference: Any, batch: Batch, queue: Queue[Pass], receiver: ResultSink) -> Exception | None:
        """Collect the results of a batch; returns the failure if it may be retried.

        Raises:
            ModelfuseError: If a retry cannot help.
        """
        try:
            reply = ray.get(reference)
        except RayError as error:
            return lost(error, batch.names)
        if isinstance(reply, Failed):
            failure = reply.restore()
            if is_final(failure):
                raise failure
            return failure
        self._take(reply, batch, queue, receiver)
        return None

    def _take(self, reply: Done, batch: Batch, queue: Queue[Pass], receiver: ResultSink) -> None:
        tasks: list[Task] = list(self._numbers) if reply.pieces else []
        for task, start, data in reply.pieces:
            tensor = tasks[task].tensor
            assert tensor is not None
            receiver.write(tensor, start, data)
        for spans, walked in zip(batch.spans, unpack(reply.walked), strict=True):
            task, pass_ = spans[0].job.owner, spans[0].pass_
            if pass_.writes:
                for span, each in zip(spans, walked, strict=True):
                    if not self._sends:
                        receiver.advance(task.tensor, span.count)
                    receiver.take(task, pass_, span.first, span.count, each)
            queue.done(spans, [each.found for each in walked])


def _landed(flying: list[Any]) -> list[Any]:
    """The finished batches; empty if none finishes within LOOK seconds."""
    landed, rest = ray.wait(flying, num_returns=1, timeout=LOOK)
    if landed and rest:
        landed += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
    return list(landed)
