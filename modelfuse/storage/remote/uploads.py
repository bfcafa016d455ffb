"""Upload files to a store while they are written; they become visible when they are completed.

Parts are sent in order. Bytes that are written ahead of their turn are buffered here and counted in ``Gate.ahead``,
which the scheduler keeps small.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, wait
from queue import SimpleQueue

import numpy as np

from modelfuse.errors import OutputError
from modelfuse.storage.remote.errors import told
from modelfuse.storage.remote.range_cache import LOOK, RANGES
from modelfuse.storage.remote.stores import Part, Store
from modelfuse.storage.remote.threads import ASKING, start
from modelfuse.storage.url import Entry, Url

#: Bytes per part, unless a file would have too many parts. Smaller files are sent in one request.
PART = 8 << 20
MOST_PARTS = 10_000
LEAST_PART = 1 << 20
#: The most parts in flight, of all files together.
UNDER_WAY = 8


class UploadAborted(Exception):
    """Raised instead of the next part, to abort an upload."""


class Gate:
    """Limits the parts in flight, counts buffered bytes, and keeps the first failure."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._under_way = 0
        self._failure: BaseException | None = None
        #: Buffered bytes that wait for earlier bytes of their files.
        self.ahead = 0

    def hand_over(self, part: Part) -> None:
        """Count a part as in flight until it is garbage collected."""
        with self._changed:
            self._under_way += 1
        weakref.finalize(part, self._sent).atexit = False

    def wait_for_slot(self) -> None:
        """Wait while too many parts are in flight; these wait for nothing but the store.

        Raises:
            OutputError: If an upload has failed.
        """
        self._wait_for(UNDER_WAY)

    def drain(self) -> None:
        """Wait until no part is in flight; see :meth:`wait_for_slot`."""
        self._wait_for(0)

    def check(self) -> None:
        """Check for failures.

        Raises:
            OutputError: If an upload has failed.
        """
        if self._failure is not None:
            raise self._failure

    def fail(self, url: Url, error: BaseException) -> None:
        """Record that a file cannot be written; the first error is kept."""
        with self._changed:
            if self._failure is None:
                self._failure = told(url, error, OutputError)
                self._failure.__cause__ = error
            self._changed.notify_all()

    def move(self, nbytes: int) -> None:
        """Add to the number of buffered bytes; may be negative."""
        with self._changed:
            self.ahead += nbytes

    def _wait_for(self, most: int) -> None:
        with self._changed:
            while self._failure is None and self._under_way > most:
                self._changed.wait(LOOK)
                RANGES.check()
            self.check()

    def _sent(self) -> None:
        with self._changed:
            self._under_way -= 1
            self._changed.notify_all()


class Parts(Iterator[Part]):
    """An iterator over the parts of a file, which blocks until the next part is added."""

    def __init__(self) -> None:
        self._queue = SimpleQueue[Part | BaseException | None]()

    def add(self, part: Part | BaseException | None) -> None:
        """Add the next part; None ends the file, an exception aborts it. Thread-safe."""
        self._queue.put(part)

    def __next__(self) -> Part:
        part = self._queue.get()
        if part is None:
            raise StopIteration
        if isinstance(part, BaseException):
            raise part
        return part


class Upload:
    """The upload of one file. Writes are thread-safe; completed or aborted by one thread.

    Args:
        store: The store.
        url: The file.
        size: The size, if it is known; otherwise the file is written in order.
        gate: Limits the parts in flight.
        before: The file of that name that is there before the upload completes.
    """

    def __init__(self, store: Store, url: Url, size: int | None, gate: Gate, before: Entry | None = None) -> None:
        self.url, self._store, self._size, self._gate, self._before = url, store, size, gate, before
        self._part = max(PART, -(-(size or 0) // MOST_PARTS))
        self._lock = threading.Lock()
        self._waiting: dict[int, Part] = {}
        self._filled: dict[int, int] = {}
        self._next = self._written = 0
        self._parts = Parts()
        self._sending: Future[None] | None = None
        self._whole: bytes | None = None

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Write bytes at an offset; blocks while too many parts are in flight.

        Raises:
            OutputError: If parts could not be sent.
        """
        begin, end, content = offset, offset + len(data), np.frombuffer(data, np.uint8)
        while begin < end:
            number = begin // self._part
            first = number * self._part
            stop = min(end, first + self._part)
            with self._lock:
                if number not in self._waiting:
                    self._waiting[number] = np.empty(self._length(number), np.uint8)
                part = self._waiting[number]
            part[begin - first : stop - first] = content[begin - offset : stop - offset]
            self._gate.move(stop - begin)
            with self._lock:
                self._filled[number] = self._filled.get(number, 0) + stop - begin
                self._written += stop - begin
                del part
                self._send_full_ones()
            begin = stop
        self._gate.wait_for_slot()

    def close(self) -> None:
        """Send the remaining bytes, after all were written."""
        with self._lock:
            if self._sending is None and self._written < LEAST_PART:
                self._whole = b"".join(part[: self._filled[number]].data for number, part in self._waiting.items())
            else:
                for number in sorted(self._waiting):
                    self._send(number)

    def begin_to_complete(self) -> None:
        """Start to complete the upload."""
        if self._whole is not None:
            content = self._whole
            self._sending = ASKING.submit(lambda: self._store.put(self.url, content))
        else:
            self._parts.add(None)

    def complete(self) -> None:
        """Wait until the upload is complete.

        Raises:
            OutputError: If it fails.
        """
        assert self._sending is not None
        try:
            self._sending.result()
        except Exception as error:
            # If the answer was lost, a retry finds no upload, because the object already exists.
            there = None
            with contextlib.suppress(OutputError):
                there = self._store.ask(self.url, OutputError)
            if there is None or there.size != self._written or there == self._before:
                raise told(self.url, error, OutputError) from error

    def begin_to_abandon(self) -> None:
        """Start to abort the upload."""
        self._parts.add(UploadAborted())

    def abandon(self, until: float) -> None:
        """Wait until the upload is aborted, at most until the given time."""
        if self._sending is not None:
            wait([self._sending], max(0.0, until - time.monotonic()))

    def _length(self, number: int) -> int:
        left = self._part if self._size is None else self._size - number * self._part
        return min(self._part, left)

    def _send_full_ones(self) -> None:
        """Send the complete parts that are next in order."""
        while self._filled.get(self._next) == self._length(self._next):
            if self._next == 0 and self._filled[0] < LEAST_PART:
                return  # The file has a single part.
            self._send(self._next)

    def _send(self, number: int) -> None:
        if self._sending is None:
            self._sending = start(lambda: self._store.put_parts(self.url, self._parts, self._part))
            self._sending.add_done_callback(self._ended)
        part, count = self._waiting.pop(number), self._filled.pop(number)
        self._gate.move(-count)
        if count == self._part:  # The remainder is sent at the end, without waiting.
            self._gate.hand_over(part)
        self._parts.add(part[:count] if count < len(part) else part)
        self._next = number + 1

    def _ended(self, sending: Future[None]) -> None:
        error = None if sending.cancelled() else sending.exception()
        if error is not None and not isinstance(error, UploadAborted):
            self._gate.fail(self.url, error)


def begin(store: Store, url: Url, size: int | None, gate: Gate, before: Entry | None = None) -> Upload:
    """Begin an upload; see :class:`Upload`.

    Raises:
        OutputError: If the store cannot be written.
    """
    if not store.writes:
        raise OutputError(f"{url} cannot be written: a web server takes no files", "Choose another output_path.")
    return Upload(store, url, size, gate, before)
