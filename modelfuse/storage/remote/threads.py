"""Threads that wait for stores, so that whoever reads and writes need not.

obstore is called from threads of Python's alone: its asynchronous calls have threads of their own hand over what they
found, and a process that ends just then is aborted.
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
#: Requests at a time, and beside them questions, which are not to wait for what is large.
REQUESTS = 32
#: Seconds that the end of the process waits for requests that are under way.
LEAVE = 3.0

#: A number of glibc's mallopt, and how many heaps its threads may have together.
M_ARENA_MAX, HEAPS = -8, 2

_LEAVING = threading.Event()
_BUSY = set[Future[Any]]()


class Pool:
    """Threads that do one piece of work after another; they do not keep the process from ending.

    Args:
        most: How many, at most.
    """

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._queue = SimpleQueue[tuple[Future[Any], Callable[[], Any]]]()
        self._threads = self._waiting = 0
        _POOLS.append(self)

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Have something done when a thread is free."""
        future = Future[T]()
        with self._lock:
            self._waiting += 1
            if self._threads < min(self._waiting, self._most):
                self._threads += 1
                threading.Thread(target=self._work, name="store", daemon=True).start()
        self._queue.put((future, work))
        return future

    def clear(self) -> None:
        """Forget what has not begun."""
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
    """Do something in a thread of its own."""
    future = Future[T]()
    threading.Thread(target=_do, args=(future, work), name="upload", daemon=True).start()
    return future


def results(futures: Iterable[Future[T]]) -> list[T]:
    """What they come to, all of them cancelled if one fails or nobody waits any more."""
    futures = list(futures)
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


def pause(seconds: float) -> bool:
    """Wait between two attempts; whether there is to be another one."""
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
    """Let threads allocate from few heaps: each of its own would keep what ranges took, 90 MB in all, measured."""
    try:
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, HEAPS)
    except (OSError, AttributeError):
        return  # Another library of C has other heaps.


@atexit.register
def _leave() -> None:
    """Begin nothing more, and wait for what is in the library: a thread that comes back too late aborts the process."""
    _LEAVING.set()
    for pool in _POOLS:
        pool.clear()
    until = time.monotonic() + LEAVE
    while _BUSY and time.monotonic() < until:
        time.sleep(0.005)
