"""Matrix products and decompositions in one thread each, as workers are as many as there are processors.

What several threads share is cut otherwise, which changes last bits: so no number of workers changes a byte.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


class _Users:
    """Who wants one thread at the moment, and what it was before."""

    def __init__(self) -> None:
        self.lock, self.count, self.limit = threading.Lock(), 0, None


_users: Any = _Users()


@cache
def _libraries() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


@contextmanager
def one_thread() -> Iterator[None]:
    """Have BLAS use the calling thread alone; as it was once nobody asks for it any more. Safe from any thread."""
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
