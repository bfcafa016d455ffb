"""This machine's part in a merge on a cluster: batches of spans given out, what they come to collected."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterable, Iterator
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
from modelfuse.execution.worker import BufferSizes, ResultSink, Task, Tasks
from modelfuse.kernels import Pass
from modelfuse.planning.plan import Plan
from modelfuse.version import __version__

#: Groups under way for each processor: one that is walked, one that waits for it.
QUEUED = 2
#: How often a batch may fail, and the seconds to wait before each attempt.
PAUSES = (0.0, 1.0, 3.0)


class Cluster:
    """A Ray cluster that walks spans.

    Args:
        limit: Seconds to wait where it has no processor.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._walk = ray.remote(num_cpus=1, max_retries=0)(node.walk)
        self._monitor = ClusterMonitor()

    @classmethod
    @contextmanager
    def reached(cls, address: str | None, limit: float) -> Iterator[Cluster]:
        """A cluster, as long as this process is connected to it.

        Raises:
            ClusterError: If it cannot be reached in time.
        """
        with reached(address, limit):
            yield cls(limit)

    @contextmanager
    def sharing(self, plan: Plan, tasks: Tasks, sizes: BufferSizes, folder: Path | None) -> Iterator[None]:
        """What all nodes must know of a merge, while they walk its spans.

        Args:
            plan: The merge.
            tasks: All that spans may be of.
            sizes: How large a worker's buffers are.
            folder: Where nodes write; None: this machine writes all.

        Raises:
            ClusterError: If a node cannot take part.
            CheckpointError: If an input has changed when all is done.
        """
        self._plan, self._sends = plan, folder is None
        every = (*tasks.equal_pairs, *tasks.tensors)
        self._numbers = {task: number for number, task in enumerate(every)}
        token = f".{secrets.token_hex(8)}"
        shipment = ray.put(pack(Shipment(folder, token, plan.device, sizes, every)))
        self._common = __version__, token, shipment
        try:
            if folder is not None:
                (folder / token).touch()
            while not self._monitor.processors(self._limit):
                time.sleep(LOOK)
            look_at_all(self._common)
            yield
            node.check_inputs(every)  # By their inodes, too, which mean nothing on other machines.
        finally:
            if folder is not None:
                with contextlib.suppress(OSError):
                    (folder / token).unlink()

    def walk(self, jobs: Iterable[Job[Pass]], span: int, receiver: ResultSink) -> None:
        """Walk the spans of all jobs to their end.

        Raises:
            ClusterError: If the cluster fails.
            Exception: What walking a span has ended with.
        """
        queue: Queue[Pass] = Queue(jobs, span, receiver.may_go_ahead)
        batcher = Batcher(queue, lambda each: receiver.has(each.job.owner, each.pass_, each.first, each.count))
        flying: dict[Any, Batch] = {}
        try:
            while True:
                processors = self._monitor.processors(self._limit)
                while len(flying) < QUEUED * max(processors, 1):
                    batch = batcher.next(batch_bytes(self._plan, processors, self._sends))
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
        """Give a batch out once more, elsewhere if its node is lost; enough is enough."""
        if batch.attempts == len(PAUSES):
            failure.add_note(f"This was tried {batch.attempts} times.")
            raise failure
        return self._send(batch)

    def _collect(self, reference: Any, batch: Batch, queue: Queue[Pass], receiver: ResultSink) -> Exception | None:
        """Take what a batch has come to; why there is nothing to take, if another attempt may help.

        Raises:
            ModelfuseError: If no attempt can.
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
    """The batches that have come back; none if it takes long."""
    landed, rest = ray.wait(flying, num_returns=1, timeout=LOOK)
    if landed and rest:
        landed += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
    return list(landed)
