"""Concurrent requests that can be interrupted."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

#: The most concurrent requests.
MOST = 8
#: Seconds to wait for jobs to stop. Threads that still wait for the network then end with the process.
GRACE = 2.0


class StoppedError(Exception):
    """Raised in a job that must stop because of another one's failure."""


class StopFlag:
    """Tells jobs to stop."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def request(self) -> None:
        """Ask all jobs to stop."""
        self._asked.set()

    def check(self) -> None:
        """Raise StoppedError if a stop was requested."""
        if self._asked.is_set():
            raise StoppedError


def run_parallel(jobs: Iterable[Callable[[StopFlag], T]]) -> list[T]:
    """Run jobs in several threads; the first failure stops the others.

    Returns:
        Their results, in order.

    Raises:
        BaseException: The first exception of a job.
    """
    waiting = queue.SimpleQueue[tuple[int, Callable[[StopFlag], T]]]()
    for job in enumerate(jobs):
        waiting.put(job)
    done: dict[int, T] = {}
    failures: list[BaseException] = []
    stop, ended = StopFlag(), queue.SimpleQueue[None]()

    def work() -> None:
        try:
            while True:
                number, job = waiting.get_nowait()
                stop.check()
                done[number] = job(stop)
        except (queue.Empty, StoppedError):
            pass
        except BaseException as error:
            failures.append(error)
        ended.put(None)

    # A thread that waits for the network cannot be interrupted; as a daemon, it does not keep the process alive.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(MOST, waiting.qsize()))]
    try:
        for thread in threads:
            thread.start()
        for _ in threads:
            ended.get()
            if failures:
                raise failures[0]
    finally:
        stop.request()
        until = time.monotonic() + GRACE
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
    return [done[number] for number in sorted(done)]
