"""This machine's part in a merge on a cluster: groups of spans given out, what they come to collected."""

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
from modelfuse.execution.ray.batches import Group, Grouping, room_for
from modelfuse.execution.ray.connect import reached
from modelfuse.execution.ray.messages import Done, Failed, Shipment, is_final, pack, unpack
from modelfuse.execution.ray.node_checks import LOOK, Watch, look_at_all, lost
from modelfuse.execution.scheduler import Job, Queue
from modelfuse.execution.worker import ResultSink, BufferSizes, Task, Tasks
from modelfuse.kernels import Pass
from modelfuse.planning.plan import Plan
from modelfuse.version import __version__

#: Groups under way for each processor: one that is walked, one that waits for it.
QUEUED = 2
#: How often a group may fail, and the seconds to wait before each attempt.
PAUSES = (0.0, 1.0, 3.0)


class Cluster:
    """A Ray cluster that walks spans.

    Args:
        limit: Seconds to wait where it has no processor.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._walk = ray.remote(num_cpus=1, max_retries=0)(node.walk)
        self._watch = Watch()

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
            while not self._watch.processors(self._limit):
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
        groups = Grouping(queue, lambda each: receiver.has(each.job.owner, each.pass_, each.first, each.count))
        flying: dict[Any, Group] = {}
        try:
            while True:
                processors = self._watch.processors(self._limit)
                while len(flying) < QUEUED * max(processors, 1):
                    group = groups.next(room_for(self._plan, processors, self._sends))
                    if group is None:
                        break
                    flying[self._send(group)] = group
                if not flying:
                    return
                for reference in _landed(list(flying)):
                    group = flying.pop(reference)
                    failure = self._collect(reference, group, queue, receiver)
                    if failure is not None:
                        flying[self._again(group, failure)] = group
        finally:
            for reference in flying:
                with contextlib.suppress(RayError):
                    ray.cancel(reference, force=True)

    def _send(self, group: Group) -> Any:
        pause, group.attempts = PAUSES[group.attempts], group.attempts + 1
        return self._walk.remote(*self._common, pack(group.parts(self._numbers)), pause)

    def _again(self, group: Group, failure: Exception) -> Any:
        """Give a group out once more, elsewhere if its node is lost; enough is enough."""
        if group.attempts == len(PAUSES):
            failure.add_note(f"This was tried {group.attempts} times.")
            raise failure
        return self._send(group)

    def _collect(self, reference: Any, group: Group, queue: Queue[Pass], receiver: ResultSink) -> Exception | None:
        """Take what a group has come to; why there is nothing to take, if another attempt may help.

        Raises:
            ModelfuseError: If no attempt can.
        """
        try:
            reply = ray.get(reference)
        except RayError as error:
            return lost(error, group.names)
        if isinstance(reply, Failed):
            failure = reply.restore()
            if is_final(failure):
                raise failure
            return failure
        self._take(reply, group, queue, receiver)
        return None

    def _take(self, reply: Done, group: Group, queue: Queue[Pass], receiver: ResultSink) -> None:
        tasks: list[Task] = list(self._numbers) if reply.pieces else []
        for task, start, data in reply.pieces:
            tensor = tasks[task].tensor
            assert tensor is not None
            receiver.write(tensor, start, data)
        for spans, walked in zip(group.spans, unpack(reply.walked), strict=True):
            task, pass_ = spans[0].job.owner, spans[0].pass_
            if pass_.writes:
                for span, each in zip(spans, walked, strict=True):
                    if not self._sends:
                        receiver.advance(task.tensor, span.count)
                    receiver.take(task, pass_, span.first, span.count, each)
            queue.done(spans, [each.found for each in walked])


def _landed(flying: list[Any]) -> list[Any]:
    """The groups that have come back; none if it takes long."""
    landed, rest = ray.wait(flying, num_returns=1, timeout=LOOK)
    if landed and rest:
        landed += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
    return list(landed)
