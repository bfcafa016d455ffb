"""Cache of ranges of remote files, through which all reads go.

Files are split into pages. Missing pages are fetched in runs, several concurrently; fetched pages stay as long as they
fit, for the next tensor that starts on the same page, and for methods that read tensors twice.
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
#: Capacity in bytes, until a plan sets it.
CAPACITY = 16 * RUN
#: Seconds between checks whether a range is still needed.
LOOK = 0.1


@dataclass(eq=False, slots=True)
class _Run:
    """Adjacent pages of one file, fetched in one request."""

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
    """Raised if a range is no longer needed."""


class Ranges:
    """The cache; thread-safe."""

    def __init__(self) -> None:
        #: Capacity in bytes. Ranges that are being read may exceed it.
        self.capacity = CAPACITY
        #: Whether ranges stay after they were read, as they will be read again.
        self.keeps = True
        self._lock = threading.Lock()
        self._pages: dict[Version, dict[int, _Run]] = {}
        #: Ordered by the last read, oldest first.
        self._runs: OrderedDict[_Run, None] = OrderedDict()
        self._held = 0
        #: For each file, expected bytes that are too few for a request of their own.
        self._expected: dict[Version, tuple[int, int]] = {}
        #: For each file, ranges that were expected while the cache was full: ends by start.
        self._refused: dict[Version, dict[int, int]] = {}
        self._ahead = 0
        self._abandoned: list[Callable[[], bool]] = []

    def expect(self, version: Version, offset: int, count: int) -> bool:
        """Start to fetch bytes that will be read soon.

        Returns:
            Whether they are cached or being fetched; False if the cache is full.
        """
        with self._lock:
            if not self._lacks(version, offset, offset + count):
                return True
            begin, end = self._expected.get(version, (offset, offset))
            if not begin <= offset <= end:  # Tensors are mostly adjacent; adjacent ones are fetched together.
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
        """Fill ``buffer`` with the bytes at ``offset``; the caller has checked that the file is long enough.

        Raises:
            CheckpointError: If they cannot be fetched.
            FetchAborted: If they are no longer needed.
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
            # numpy's copy releases the GIL for the threads that fetch.
            np.copyto(out[position - offset : stop - offset], content[position - run.start : stop - run.start])
            position = stop
            self._release(run, stop - max(offset, run.start))

    def forget(self) -> None:
        """Drop everything, and reset the capacity: the next plan is made before it sets it."""
        with self._lock:
            self.capacity, self.keeps = CAPACITY, True
            self._expected.clear()
            self._refused.clear()
            for run in list(self._runs):
                self._drop(run)

    @contextmanager
    def waiting_while(self, goes_on: Callable[[], bool]) -> Iterator[None]:
        """Stop waiting as soon as ``goes_on`` returns False, for the duration of the context."""
        self._abandoned.append(goes_on)
        try:
            yield
        finally:
            self._abandoned.remove(goes_on)

    def check(self) -> None:
        """Check that ranges are still needed.

        Raises:
            FetchAborted: If not.
        """
        if not all(goes_on() for goes_on in self._abandoned):
            raise FetchAborted

    def _run_at(self, version: Version, position: int) -> _Run:
        with self._lock:
            run = self._pages.get(version, {}).get(position // PAGE)
            if run is None:  # Dropped meanwhile to make space.
                start = position // PAGE * PAGE
                run = self._send(version, start, min(start + PAGE, version.entry.size))
            if not run.is_read:
                run.is_read = True
                self._ahead -= run.end - run.start
            self._runs.move_to_end(run)
            return run

    def _release(self, run: _Run, count: int) -> None:
        """Record that bytes were read; a run is dropped once all were, as memory that is reused at once is fastest."""
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
        """Whether any bytes are neither cached, nor being fetched, nor expected."""
        begin, stop = self._expected.get(version, (end, end))
        return any(self._missing(version, start, begin if start < begin < end <= stop else end)) and not (
            begin <= start and end <= stop
        )

    def _wanted(self, version: Version, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The runs to fetch for bytes that are read now."""
        if any(self._missing(version, start, end)):  # The rest of a refused range will be read soon as well.
            refused = self._refused.get(version, {})
            ends = [refused.pop(begin) for begin, stop in list(refused.items()) if begin < end and start < stop]
            yield from self._missing(version, start, max([end, *ends]))

    def _missing(self, version: Version, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Runs of pages that are neither cached nor being fetched."""
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
        """Start to fetch the expected bytes of a file; without ``all_of_it``, only whole runs."""
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
        """Drop the oldest runs until ``count`` bytes fit; if urgent, also runs that were not read yet."""
        if not urgent and self._ahead + count > self.capacity // 2:
            return False
        # Runs that were read completely go first; partly read ones may be in use, most likely the last read.
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


#: The cache of this process.
RANGES = Ranges()
