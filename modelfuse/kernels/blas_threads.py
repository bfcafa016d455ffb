"""Run BLAS and LAPACK with one thread per worker.

The workers already use all processors. And BLAS splits a product differently for another number of threads, which
changes last bits: with one thread, the number of workers never changes a byte.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


class _Users:
    """The number of users of the limit, and the setting before it."""

    def __init__(self) -> None:
        self.lock, self.count, self.limit = threading.Lock(), 0, None


_users: Any = _Users()


@cache
def _libraries() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit BLAS to the calling thread; restored when the last user leaves the context. Thread-safe."""
    with _users.lock:
        if not _users.count:
            _users.limit = _libraries().limit(limits=1)
        _users.count += 1
    try:
        yield
    finally:
        with _users.lock:
            _users.count -= 1
            if not _users.count:
                _users.limit.restore_original_limits()
