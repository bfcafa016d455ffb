"""What holds objects: listed, asked, read by ranges and written by parts, with several requests at a time.

Each request is tried again while that may help, and none is waited for without end.
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
#: Bytes that were fetched.
Content = bytes | memoryview
#: Bytes to send: whoever holds one may not change it.
Part = np.ndarray[Any, np.dtype[np.uint8]]
#: How often a request is made, and how long the first pause is (each is twice the one before). How long one may take,
#: which is also how long after the first one another may begin.
ATTEMPTS = 6
PAUSE = 0.2
SECONDS = 300.0


class Store(ABC):
    """A store, or one bucket of it."""

    #: Whether it tells all names in a folder, and whether it takes files.
    lists = writes = True

    def __init__(self) -> None:
        self._listings: dict[str, dict[str, Entry | None]] = {}
        self._lock = threading.Lock()

    # --- questions ---------------------------------------------------------------------------------------------

    def listing(self, folder: Url) -> Mapping[str, Entry | None]:
        """All that is directly in a folder, by name: files, and folders as None. Asked once.

        Raises:
            CheckpointError: If the store cannot be asked.
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
        """What is known of a file, None if there is none.

        Raises:
            CheckpointError: If the store cannot be asked.
        """
        with self._lock:
            known = self._listings.get(str(url.parent)) if url.path else None
        if known is not None:
            return known.get(url.name)
        return self.ask(url)

    def ask(self, url: Url, kind: type[ModelfuseError] = CheckpointError) -> Entry | None:
        """The same, asked now.

        Raises:
            ModelfuseError: Of the given kind, if the store cannot be asked.
        """
        return self.together(url, [lambda: self._ask(url)], kind)[0]

    def list_now(self, folder: Url, kind: type[ModelfuseError] = CheckpointError) -> dict[str, Entry | None]:
        """The listing as it is now; see :meth:`ask`."""
        return dict(sorted(self.together(folder, [lambda: self._list(folder)], kind)[0].items()))

    def look_up(self, folder: Url, names: Iterable[str]) -> None:
        """Make sure that the listing of a folder knows these files, if they are there."""
        self.listing(folder)

    def forget(self) -> None:
        """Ask again from now on."""
        with self._lock:
            self._listings.clear()

    @abstractmethod
    def _ask(self, url: Url) -> Entry | None:
        """One attempt to ask for a file."""

    @abstractmethod
    def _list(self, folder: Url) -> dict[str, Entry | None]:
        """One attempt to list a folder; empty if there is none."""

    # --- bytes -------------------------------------------------------------------------------------------------

    def fetch(self, url: Url, entry: Entry, start: int, end: int) -> Future[Content]:
        """Send for some bytes of a file.

        Returns:
            What fails with whatever the libraries raise; :func:`told` makes sense of it.
        """

        def once() -> Content:
            content = self._range(url, entry, start, end)
            if len(content) < end - start:
                raise Truncated
            if len(content) > end - start:
                raise WrongAnswer("more bytes came than were asked for")
            return content

        return READING.submit(lambda: attempt(once))

    @abstractmethod
    def _range(self, url: Url, entry: Entry, start: int, end: int) -> Content:
        """One attempt to read some bytes of a version of a file.

        Raises:
            Replaced: If it is another version.
        """

    @abstractmethod
    def put(self, url: Url, content: bytes) -> None:
        """Write a small file whole."""

    @abstractmethod
    def put_parts(self, url: Url, parts: Iterator[Part], size: int) -> None:
        """Write a file as its parts come, of so many bytes each but for the last one.

        It is seen when the parts have ended, and nothing is left of it if they end with an exception.
        """

    @abstractmethod
    def _remove(self, url: Url) -> None:
        """One attempt to remove a file."""

    def remove(self, folder: Url, names: Iterable[str], kind: type[ModelfuseError] = CheckpointError) -> None:
        """Remove files of a folder, those that are not there included; see :meth:`ask`."""

        def one(url: Url) -> None:
            try:
                self._remove(url)
            except Exception as error:
                if not is_missing(error):
                    raise

        self.together(folder, [functools.partial(one, folder / name) for name in names], kind)

    def clear(self, folder: Url) -> None:  # noqa: B027
        """Remove what was written to a folder and never completed: by this run, or by one that was killed."""

    def together(
        self, url: Url, requests: Iterable[Callable[[], T]], kind: type[ModelfuseError] = CheckpointError
    ) -> list[T]:
        """Make small requests at the same time, with as many attempts as may help.

        Raises:
            ModelfuseError: Of the given kind, if one fails.
        """
        try:
            return results([ASKING.submit(functools.partial(attempt, request)) for request in requests])
        except Exception as error:
            raise told(url, error, kind) from error


def attempt(request: Callable[[], T]) -> T:
    """Make a request, and again after a pause while that may help."""
    until = time.monotonic() + SECONDS
    for number in range(ATTEMPTS - 1):
        try:
            return request()
        except Exception as error:
            seconds = PAUSE * 2**number * random.uniform(0.5, 1.5)
            if not is_passing(error) or time.monotonic() + seconds >= until or not pause(seconds):
                raise
    return request()
