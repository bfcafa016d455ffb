"""Ranges of remote files that were fetched, or are on their way: every read is served from here.

Files are cut into pages. Pages that are missing are fetched in runs, several at a time; what was fetched stays while
there is room, for the next tensor that begins on the same page, and for methods that read a tensor twice.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from modelfuse.storage.remote.errors import told
from modelfuse.storage.remote.open_store import store_of
from modelfuse.storage.remote.stores import Content
from modelfuse.storage.url import Version

PAGE = 1 << 18
#: The most bytes of one request.
RUN = 1 << 23
#: Bytes kept before a plan has said how many may be.
CAPACITY = 16 * RUN
#: Seconds between two looks whether a range is still waited for.
LOOK = 0.1


@dataclass(eq=False, slots=True)
class _Run:
    """Neighbouring pages of one file, fetched together."""

    version: Version
    start: int
    end: int
    content: Future[Content]
    is_read: bool = False
    left: int = field(init=False)
    pages: range = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.end - self.start
        self.pages = range(self.start // PAGE, -(-self.end // PAGE))


class FetchAborted(Exception):
    """Raised where a range is no longer waited for."""


class Ranges:
    """What was fetched; safe from any thread."""

    def __init__(self) -> None:
        #: The most bytes to hold. What is being read stays beside them.
        self.capacity = CAPACITY
        #: Whether what was read is kept while there is room, as it will be read again.
        self.keeps = True
        self._lock = threading.Lock()
        self._pages: dict[Version, dict[int, _Run]] = {}
        #: From the one that was read longest ago.
        self._runs: OrderedDict[_Run, None] = OrderedDict()
        self._held = 0
        #: Bytes of each file that are needed soon, but are too few for a request of their own.
        self._expected: dict[Version, tuple[int, int]] = {}
        #: What was expected of each file when there was no room: first bytes, and ends.
        self._refused: dict[Version, dict[int, int]] = {}
        self._ahead = 0
        self._abandoned: list[Callable[[], bool]] = []

    def expect(self, version: Version, offset: int, count: int) -> bool:
        """Send for bytes that will be read soon.

        Returns:
            Whether they are there or on their way; False if there is no room for them yet.
        """
        with self._lock:
            if not self._lacks(version, offset, offset + count):
                return True
            begin, end = self._expected.get(version, (offset, offset))
            if not begin <= offset <= end:  # Tensors mostly follow one another: those that do are fetched together.
                self._send_expected(version)
                begin = end = offset
            stop = max(end, offset + count)
            if not self._make_space(stop - begin):
                self._refused.setdefault(version, {})[offset] = offset + count
                return False
            self._refused.get(version, {}).pop(offset, None)
            self._expected[version] = begin, stop
            if stop - begin >= RUN:
                self._send_expected(version, all_of_it=False)
        return True

    def read(self, version: Version, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes at ``offset``, which lie in the file.

        Raises:
            CheckpointError: If they cannot be fetched.
            FetchAborted: If they are no longer waited for.
        """
        end = offset + len(buffer)
        with self._lock:
            begin, stop = self._expected.get(version, (0, 0))
            if begin < end and offset < stop:
                self._send_expected(version)
            for start, stop in self._wanted(version, offset, end):
                self._make_space(stop - start, urgent=True)
                self._send(version, start, stop)
        position, out = offset, np.frombuffer(buffer, np.uint8)
        while position < end:
            run = self._run_at(version, position)
            content = np.frombuffer(self._content(run), np.uint8)
            stop = min(run.end, end)
            # This copy lets other threads go on, such as the one that fetches.
            np.copyto(out[position - offset : stop - offset], content[position - run.start : stop - run.start])
            position = stop
            self._release(run, stop - max(offset, run.start))

    def forget(self) -> None:
        """Keep nothing, and have the room of before any plan: the next one is made before it says how much it needs."""
        with self._lock:
            self.capacity, self.keeps = CAPACITY, True
            self._expected.clear()
            self._refused.clear()
            for run in list(self._runs):
                self._drop(run)

    @contextmanager
    def waiting_while(self, goes_on: Callable[[], bool]) -> Iterator[None]:
        """Give up what is waited for as soon as nobody needs it any more."""
        self._abandoned.append(goes_on)
        try:
            yield
        finally:
            self._abandoned.remove(goes_on)

    def check(self) -> None:
        """Whether anybody still waits.

        Raises:
            FetchAborted: If not.
        """
        if not all(goes_on() for goes_on in self._abandoned):
            raise FetchAborted

    def _run_at(self, version: Version, position: int) -> _Run:
        with self._lock:
            run = self._pages.get(version, {}).get(position // PAGE)
            if run is None:  # Dropped meanwhile, for want of room.
                start = position // PAGE * PAGE
                run = self._send(version, start, min(start + PAGE, version.entry.size))
            if not run.is_read:
                run.is_read = True
                self._ahead -= run.end - run.start
            self._runs.move_to_end(run)
            return run

    def _release(self, run: _Run, count: int) -> None:
        """Take note that so many bytes were read. Room that is used again at once is the quickest."""
        with self._lock:
            run.left -= count
            if run.left <= 0 and not self.keeps:
                self._drop(run)

    def _content(self, run: _Run) -> Content:
        try:
            while not run.content.done():
                self.check()
                wait([run.content], LOOK)
            return run.content.result()
        except (Exception, CancelledError) as error:
            with self._lock:
                self._drop(run)
            if isinstance(error, FetchAborted | CancelledError):
                raise FetchAborted from None
            raise told(run.version.url, error) from error

    def _lacks(self, version: Version, start: int, end: int) -> bool:
        """Whether any bytes are neither there, nor on their way, nor expected."""
        begin, stop = self._expected.get(version, (end, end))
        return any(self._missing(version, start, begin if start < begin < end <= stop else end)) and not (
            begin <= start and end <= stop
        )

    def _wanted(self, version: Version, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Runs to send for, for bytes that are read now."""
        if any(self._missing(version, start, end)):  # Who reads some of what was refused will soon read the rest.
            refused = self._refused.get(version, {})
            ends = [refused.pop(begin) for begin, stop in list(refused.items()) if begin < end and start < stop]
            yield from self._missing(version, start, max([end, *ends]))

    def _missing(self, version: Version, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Runs of pages that are neither there nor on their way."""
        pages = self._pages.get(version, {})
        size, first = version.entry.size, None
        last = -(-min(end, size) // PAGE)
        for page in range(start // PAGE, last + 1):
            is_missing = page < last and page not in pages
            if first is not None and (not is_missing or (page - first) * PAGE >= RUN):
                yield first * PAGE, min(page * PAGE, size)
                first = None
            if is_missing and first is None:
                first = page

    def _send_expected(self, version: Version, all_of_it: bool = True) -> None:
        """Send for what is expected of a file; or for whole runs of it only."""
        begin, end = self._expected.pop(version, (0, 0))
        stop = end if all_of_it else begin + (end - begin) // RUN * RUN
        for start, until in self._missing(version, begin, stop):
            self._send(version, start, until)
        if stop < end:
            self._expected[version] = stop, end

    def _send(self, version: Version, start: int, end: int) -> _Run:
        run = _Run(version, start, end, store_of(version.url).fetch(version.url, version.entry, start, end))
        pages = self._pages.setdefault(version, {})
        pages.update((page, run) for page in run.pages)
        self._runs[run] = None
        self._held += end - start
        self._ahead += end - start
        return run

    def _make_space(self, count: int, urgent: bool = False) -> bool:
        """Drop what was read longest ago until there is room; what is urgent also takes what was never read."""
        if not urgent and self._ahead + count > self.capacity // 2:
            return False
        # What was read to its end goes first; somebody may be in the middle of the rest, and is where it was read last.
        orders: list[Callable[[_Run], bool]] = [lambda run: run.left <= 0, lambda run: run.is_read]
        if urgent:
            orders.append(lambda _: True)
        for may_go in orders:
            for run in list(self._runs) if self._held + count > self.capacity else ():
                if run.content.done() and may_go(run):
                    self._drop(run)
                if self._held + count <= self.capacity:
                    return True
        return self._held + count <= self.capacity

    def _drop(self, run: _Run) -> None:
        if run not in self._runs:
            return
        del self._runs[run]
        run.content.cancel()
        pages = self._pages[run.version]
        for page in run.pages:
            pages.pop(page, None)
        if not pages:
            del self._pages[run.version]
        self._held -= run.end - run.start
        if not run.is_read:
            self._ahead -= run.end - run.start


#: Of the whole process, whatever it merges or verifies.
RANGES = Ranges()
