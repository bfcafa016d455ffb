"""Run BLAS and LAPACK with one thread per worker.

The workers already use all processors: with further threads of BLAS, decompositions take many times as long. And BLAS
splits a product differently for another number of threads, which changes last bits: with one thread, the number of
workers never changes a byte.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


class _Users:
    """The number of users of the limit, and the threads of the libraries before it."""

    def __init__(self) -> None:
        self.lock, self.count, self.before = threading.Lock(), 0, list[int]()


_users = _Users()


@cache
def _libraries() -> tuple[list[Any], list[Any]]:
    """The libraries that have one limit for the process, and those that have one for each calling thread."""
    from threadpoolctl import ThreadpoolController

    found = ThreadpoolController().select(user_api="blas").lib_controllers
    by_thread = [each for each in found if getattr(each, "threading_layer", None) == "openmp"]
    return [each for each in found if each not in by_thread], by_thread


def _limit(library: Any, number: int) -> None:
    # From release 3.8 on, threadpoolctl ignores all threads but the first that has set a limit, unless told otherwise.
    if release := getattr(library, "clear_controlling_thread", None):
        release(force=True)
    library.set_num_threads(number)


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit BLAS to the calling thread; restored when the last user leaves the context. Thread-safe."""
    shared, by_thread = _libraries()
    own = [each.get_num_threads() for each in by_thread]
    with _users.lock:
        if not _users.count:
            _users.before = [each.get_num_threads() for each in shared]
            for each in shared:
                _limit(each, 1)
        _users.count += 1
    try:
        for each in by_thread:
            _limit(each, 1)
        yield
    finally:
        for each, number in zip(by_thread, own, strict=True):
            _limit(each, number)
        with _users.lock:
            _users.count -= 1
            if not _users.count:
                for each, number in zip(shared, _users.before, strict=True):
                    _limit(each, number)
