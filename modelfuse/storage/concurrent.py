"""Doing the same with many files of a store at the same time: each waits for answers most of the time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from modelfuse.storage import PathOrUrl, Url

T = TypeVar("T")
#: Files that are asked for at the same time.
AT_ONCE = 32


def each_of(work: Callable[[PathOrUrl], T], places: Sequence[PathOrUrl]) -> list[T]:
    """The results of a function for each place, in their order; those in stores at the same time.

    Raises:
        BaseException: What it raised for the first place that it raised anything for.
    """
    if len(places) < 2 or not any(isinstance(place, Url) for place in places):
        return [work(place) for place in places]
    from concurrent.futures import ThreadPoolExecutor

    from modelfuse.storage.remote.range_cache import RANGES

    over = threading.Event()
    pool = ThreadPoolExecutor(min(len(places), AT_ONCE), "asking")
    with RANGES.waiting_while(lambda: not over.is_set()):
        try:
            return list(pool.map(work, places))
        except BaseException:
            over.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
