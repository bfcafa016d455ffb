"""Apply a function to many remote files concurrently, as most of the time is spent waiting for answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from modelfuse.storage import PathOrUrl, Url

T = TypeVar("T")
#: The most concurrent requests.
AT_ONCE = 32


def each_of(work: Callable[[PathOrUrl], T], paths: Sequence[PathOrUrl]) -> list[T]:
    """The results of a function for each path, in order; remote ones are processed concurrently.

    Raises:
        BaseException: The first exception, in the order of the paths.
    """
    if len(paths) < 2 or not any(isinstance(path, Url) for path in paths):
        return [work(path) for path in paths]
    from concurrent.futures import ThreadPoolExecutor

    from modelfuse.storage.remote.range_cache import RANGES

    over = threading.Event()
    pool = ThreadPoolExecutor(min(len(paths), AT_ONCE), "asking")
    with RANGES.waiting_while(lambda: not over.is_set()):
        try:
            return list(pool.map(work, paths))
        except BaseException:
            over.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
