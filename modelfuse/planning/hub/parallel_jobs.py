"""Many requests at once, which an interruption ends soon."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

#: Requests at a time, of all models together.
MOST = 8
#: Seconds to wait for requests that were told to stop. What still waits for its network then ends with the process.
GRACE = 2.0


class StoppedError(Exception):
    """Raised in a job that is to stop because of another one."""


class Stop:
    """Whether the jobs are to end."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def ask(self) -> None:
        """Tell all jobs."""
        self._asked.set()

    def check(self) -> None:
        """Raise StoppedError if they are to end."""
        if self._asked.is_set():
            raise StoppedError


def together(jobs: Iterable[Callable[[Stop], T]]) -> list[T]:
    """Do jobs in several threads; the first failure ends the others.

    Returns:
        What they return, in their order.
    """
    waiting = queue.SimpleQueue[tuple[int, Callable[[Stop], T]]]()
    for job in enumerate(jobs):
        waiting.put(job)
    done: dict[int, T] = {}
    failures: list[BaseException] = []
    stop, ended = Stop(), queue.SimpleQueue[None]()

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

    # A thread that waits for a network cannot be told to stop: as a daemon, it does not keep the process.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(MOST, waiting.qsize()))]
    try:
        for thread in threads:
            thread.start()
        for _ in threads:
            ended.get()
            if failures:
                raise failures[0]
    finally:
        stop.ask()
        until = time.monotonic() + GRACE
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
    return [done[number] for number in sorted(done)]
