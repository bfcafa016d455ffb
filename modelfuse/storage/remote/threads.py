"""Threads for requests to stores.

obstore is called synchronously from Python threads: its asynchronous calls deliver results from threads of their own,
and a process that exits at that moment is aborted.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
#: The most concurrent fetches; queries have as many threads of their own, so that they do not wait for large fetches.
REQUESTS = 32
#: Seconds that the exit of the process waits for requests in progress.
LEAVE = 3.0

#: glibc's mallopt parameter for the number of arenas, and its value.
M_ARENA_MAX, HEAPS = -8, 2

_LEAVING = threading.Event()
_BUSY = set[Future[Any]]()


class Pool:
    """A pool of daemon threads.

    Args:
        most: The most threads.
    """

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._queue = SimpleQueue[tuple[Future[Any], Callable[[], Any]]]()
        self._threads = self._waiting = 0
        _POOLS.append(self)

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run a function on the next free thread."""
        future = Future[T]()
        with self._lock:
            self._waiting += 1
            if self._threads < min(self._waiting, self._most):
                self._threads += 1
                threading.Thread(target=self._work, name="store", daemon=True).start()
        self._queue.put((future, work))
        return future

    def clear(self) -> None:
        """Drop work that has not started."""
        while True:
            try:
                self._queue.get_nowait()[0].cancel()
            except Empty:
                return

    def _work(self) -> None:
        while True:
            _do(*self._queue.get())
            with self._lock:
                self._waiting -= 1


_POOLS: list[Pool] = []
READING, ASKING = Pool(REQUESTS), Pool(REQUESTS)


def start(work: Callable[[], T]) -> Future[T]:
    """Run a function in a new thread."""
    future = Future[T]()
    threading.Thread(target=_do, args=(future, work), name="upload", daemon=True).start()
    return future


def results(futures: Iterable[Future[T]]) -> list[T]:
    """The results of futures; all are cancelled if one fails or the results are no longer needed."""
    futures = list(futures)
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


def pause(seconds: float) -> bool:
    """Sleep before a retry; returns whether to retry."""
    return not _LEAVING.wait(seconds)


def _do(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    _BUSY.add(future)
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
    finally:
        _BUSY.discard(future)


def share_heaps() -> None:
    """Limit the number of malloc arenas: one per thread would retain freed ranges, 90 MB in all, measured."""
    try:
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, HEAPS)
    except (OSError, AttributeError):
        return  # Not glibc.


@atexit.register
def _leave() -> None:
    """Start nothing more, and wait for threads in the library: one that returns during exit aborts the process."""
    _LEAVING.set()
    for pool in _POOLS:
        pool.clear()
    until = time.monotonic() + LEAVE
    while _BUSY and time.monotonic() < until:
        time.sleep(0.005)
