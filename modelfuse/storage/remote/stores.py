"""The interface of stores: list, query, read by ranges and write in parts, with concurrent requests.

Requests are retried while that may help, and have time limits.
"""

from __future__ import annotations

import functools
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np

from modelfuse.errors import CheckpointError, ModelfuseError
from modelfuse.storage.remote.errors import Truncated, WrongAnswer, is_missing, is_passing, told
from modelfuse.storage.remote.threads import ASKING, READING, pause, results
from modelfuse.storage.url import Entry, Url

T = TypeVar("T")
#: Fetched bytes.
Content = bytes | memoryview
#: Bytes to send; must not be modified.
Part = np.ndarray[Any, np.dtype[np.uint8]]
#: The number of attempts, and the seconds of the first pause (each pause is twice the one before). The time limit of an
#: attempt, which is also the time after the first attempt until which another may start.
ATTEMPTS = 6
PAUSE = 0.2
SECONDS = 300.0


class Store(ABC):
    """A store: a bucket or a server."""

    #: Whether it can list folders, and whether it can be written.
    lists = writes = True

    def __init__(self) -> None:
        self._listings: dict[str, dict[str, Entry | None]] = {}
        self._lock = threading.Lock()

    # --- questions ---------------------------------------------------------------------------------------------

    def listing(self, folder: Url) -> Mapping[str, Entry | None]:
        """The content of a folder by name; subfolders are None. Cached.

        Raises:
            CheckpointError: If the request fails.
        """
        with self._lock:
            known = self._listings.get(str(folder))
            around = self._listings.get(str(folder.parent)) if folder.path and self.lists else None
        if known is None and around is not None and folder.name not in around:
            return {}
        if known is None:
            known = self.list_now(folder)
            with self._lock:
                self._listings[str(folder)] = known
        return known

    def entry(self, url: Url) -> Entry | None:
        """The entry of a file, None if it does not exist. Cached.

        Raises:
            CheckpointError: If the request fails.
        """
        with self._lock:
            known = self._listings.get(str(url.parent)) if url.path else None
        if known is not None:
            return known.get(url.name)
        return self.ask(url)

    def ask(self, url: Url, kind: type[ModelfuseError] = CheckpointError) -> Entry | None:
        """The same, without the cache.

        Raises:
            ModelfuseError: Of the given kind, if the request fails.
        """
        return self.together(url, [lambda: self._ask(url)], kind)[0]

    def list_now(self, folder: Url, kind: type[ModelfuseError] = CheckpointError) -> dict[str, Entry | None]:
        """The listing, without the cache; see :meth:`ask`."""
        return dict(sorted(self.together(folder, [lambda: self._list(folder)], kind)[0].items()))

    def look_up(self, folder: Url, names: Iterable[str]) -> None:
        """Make sure that the cached listing of a folder has these files, if they exist."""
        self.listing(folder)

    def forget(self) -> None:
        """Drop the cache."""
        with self._lock:
            self._listings.clear()

    @abstractmethod
    def _ask(self, url: Url) -> Entry | None:
        """One attempt to query a file."""

    @abstractmethod
    def _list(self, folder: Url) -> dict[str, Entry | None]:
        """One attempt to list a folder; empty if there is none."""

    # --- bytes -------------------------------------------------------------------------------------------------

    def fetch(self, url: Url, entry: Entry, start: int, end: int) -> Future[Content]:
        """Start to fetch bytes of a file.

        Returns:
            A future, which fails with the library's exceptions; see :func:`told`.
        """

        def once() -> Content:
            content = self._range(url, entry, start, end)
            if len(content) < end - start:
                raise Truncated
            if len(content) > end - start:
                raise WrongAnswer("it sent more bytes than were requested")
            return content

        return READING.submit(lambda: attempt(once))

    @abstractmethod
    def _range(self, url: Url, entry: Entry, start: int, end: int) -> Content:
        """One attempt to read bytes of a version of a file.

        Raises:
            Replaced: If the store has another version.
        """

    @abstractmethod
    def put(self, url: Url, content: bytes) -> None:
        """Write a small file whole."""

    @abstractmethod
    def put_parts(self, url: Url, parts: Iterator[Part], size: int) -> None:
        """Write a file in parts of ``size`` bytes; the last may be smaller.

        It becomes visible when the parts have ended; if they end with an exception, nothing is left of it.
        """

    @abstractmethod
    def _remove(self, url: Url) -> None:
        """One attempt to remove a file."""

    def remove(self, folder: Url, names: Iterable[str], kind: type[ModelfuseError] = CheckpointError) -> None:
        """Remove files of a folder; missing ones are no error. See :meth:`ask`."""

        def one(url: Url) -> None:
            try:
                self._remove(url)
            except Exception as error:
                if not is_missing(error):
                    raise

        self.together(folder, [functools.partial(one, folder / name) for name in names], kind)

    def clear(self, folder: Url) -> None:  # noqa: B027
        """Remove unfinished uploads to a folder, of this run or of one that was killed."""

    def together(
        self, url: Url, requests: Iterable[Callable[[], T]], kind: type[ModelfuseError] = CheckpointError
    ) -> list[T]:
        """Make small requests concurrently, with retries.

        Raises:
            ModelfuseError: Of the given kind, if one fails.
        """
        try:
            return results([ASKING.submit(functools.partial(attempt, request)) for request in requests])
        except Exception as error:
            raise told(url, error, kind) from error


def attempt(request: Callable[[], T]) -> T:
    """Make a request; retry it after pauses while that may help."""
    until = time.monotonic() + SECONDS
    for number in range(ATTEMPTS - 1):
        try:
            return request()
        except Exception as error:
            seconds = PAUSE * 2**number * random.uniform(0.5, 1.5)
            if not is_passing(error) or time.monotonic() + seconds >= until or not pause(seconds):
                raise
    return request()
