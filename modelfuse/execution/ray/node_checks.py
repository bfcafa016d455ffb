"""Check the nodes of a cluster, and monitor their number."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import GetTimeoutError, NodeDiedError, RayError, RayTaskError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from modelfuse.errors import ClusterError, ModelfuseError
from modelfuse.execution.ray import node
from modelfuse.printable import PrintableText

#: Seconds for a node to answer whether it can take part: it may have to start a process and import this package.
LIMIT = 120.0
#: Seconds between two queries for the nodes.
LOOK = 1.0
#: The most problems of nodes that an error lists.
MOST_PROBLEMS = 5
SHARED = "All inputs and output_path must lie on a filesystem that all nodes share."


class Node(NamedTuple):
    """A node.

    Attributes:
        key: Ray's node ID.
        name: The host name.
        processors: The number of CPUs.
    """

    key: str
    name: str
    processors: int


def nodes() -> list[Node]:
    """The live nodes that have processors.

    Raises:
        ClusterError: If the cluster does not answer.
    """
    try:
        listed = [each for each in ray.nodes() if each["Alive"]]
    except RayError as error:
        raise ClusterError(f"The Ray cluster does not answer any more: {_first_line(error)}") from error
    found = [Node(each["NodeID"], each["NodeManagerHostname"], int(each["Resources"].get("CPU", 0))) for each in listed]
    return [each for each in found if each.processors]


class ClusterMonitor:
    """Monitors the number of processors of a cluster, whose nodes come and go.

    The nodes are queried on a thread, as Ray blocks for minutes if the head node does not answer.
    """

    def __init__(self) -> None:
        self._found, self._failure = 0, list[Exception]()
        self._asking: threading.Thread | None = None
        #: Times of the last query, of the last answer, and when the cluster last had a processor.
        self._asked = 0.0
        self._answered = self._seen = time.monotonic()

    def processors(self, limit: float) -> int:
        """The number of processors, at most about a second old.

        Args:
            limit: Seconds that the cluster may have no processors, or not answer.

        Raises:
            ClusterError: If the limit is exceeded.
        """
        now = time.monotonic()
        if self._asking is None or (not self._asking.is_alive() and now - self._asked > LOOK):
            first, self._asked = self._asking is None, now
            self._asking = threading.Thread(target=self._ask, name="nodes", daemon=True)
            self._asking.start()
            if first:
                self._asking.join(limit)
        if self._failure:
            raise self._failure[0]
        if self._found:
            self._seen = max(self._seen, self._answered)
        if now - self._answered > limit:
            raise ClusterError(f"The Ray cluster has not answered for {limit:g} s", "Merge again when it is back.")
        if not self._found and now - self._seen > limit:
            raise ClusterError(
                f"The Ray cluster has had no processor for {limit:g} s",
                "Add nodes to it, then merge again; --ray_timeout waits longer.",
            )
        return self._found

    def _ask(self) -> None:
        try:
            self._found = sum(each.processors for each in nodes())
            self._answered = time.monotonic()
        except Exception as error:
            self._failure.append(error)


def look_at_all(common: Sequence[Any]) -> None:
    """Check that each node can take part in a merge.

    Args:
        common: The arguments of :func:`~modelfuse.execution.ray.node.look`.

    Raises:
        ClusterError: If one cannot.
    """
    look, asked = ray.remote(num_cpus=0, max_retries=0)(node.look), []
    for each in nodes():
        there = NodeAffinitySchedulingStrategy(each.key, soft=False)
        asked.append((each, look.options(scheduling_strategy=there).remote(*common)))
    problems = [problem for each, reference in asked if (problem := _answer(each, reference)) is not None]
    if problems:
        listed = list(dict.fromkeys(each.message for each in problems))
        more = [f"and {len(listed) - MOST_PROBLEMS} more"] if len(listed) > MOST_PROBLEMS else []
        raise ClusterError(PrintableText.of([*listed[:MOST_PROBLEMS], *more]), problems[0].hint)


def _answer(asked: Node, reference: Any) -> ClusterError | None:
    """Why a node cannot take part; None if it can, or if it is gone by now."""
    name = f"The node {asked.name} (Ray's {asked.key[:8]})"
    try:
        failed = ray.get(reference, timeout=LIMIT)
    except (NodeDiedError, TaskUnschedulableError):
        return None
    except GetTimeoutError:
        return ClusterError(f"{name} has not answered for {LIMIT:g} s")
    except RayError as error:
        return ClusterError(f"{name} cannot run modelfuse: {_reason(error)}", "Install the same version on all nodes.")
    if failed is None:
        return None
    problem = failed.restore()
    if isinstance(problem, ClusterError):
        return problem
    assert isinstance(problem, ModelfuseError)
    return ClusterError(f"{name} cannot take part: {problem.message}", SHARED)


def lost(error: RayError, names: Sequence[str]) -> ClusterError:
    """The error for the tensors of a task that was lost or failed in Ray."""
    more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    failure = ClusterError(
        f"{names[0]!r}{more}: the Ray task has failed: {_reason(error)}",
        "Run the command again: a merge is resumed from here. `ray status` and Ray's logs on the node may tell more.",
    )
    failure.__cause__ = error
    return failure


def _reason(error: RayError) -> str:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return _first_line(cause)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
