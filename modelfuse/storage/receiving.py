"""Ranges received straight into the memory they are for: a thread for each, over connections that are kept.

The libraries of stores hand over what comes in small pieces, all of them on one thread, and copy it several times. Here
the system puts it where it is to lie, while other threads go on. Nothing unusual is dealt with: it is :class:`Odd`, and
whoever asked asks again through the library.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import numpy as np

from modelfuse.storage.troubles import PASSING, Cut

#: Raises what is wrong with an answer, by its headers.
Check = Callable[[Mapping[str, str]], None]


class Odd(Exception):
    """Raised where the library must see for itself."""


class Refused(Exception):
    """Raised where a server asks to come again.

    Attributes:
        status: What it answered with.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


@dataclass(frozen=True, slots=True)
class Request:
    """How a file is asked for: as its library would, but for the range.

    Attributes:
        url: Where.
        headers: What is sent, which is all that may be signed.
        context: How the server proves who it is; None: it need not.
        connecting: Seconds that connecting may take.
        reading: Seconds without a byte.
    """

    url: str
    headers: Mapping[str, str]
    context: ssl.SSLContext | None
    connecting: float
    reading: float


class Lines:
    """Connections that can be used once more, and the threads that wait at them."""

    def __init__(self) -> None:
        self._idle: dict[tuple[str, str], list[HTTPConnection]] = {}
        self._lock = threading.Lock()
        self._work = queue.SimpleQueue[Callable[[], None] | None]()
        self._threads = self._resting = 0

    def start(self, work: Callable[[], None]) -> None:
        """Do something in another thread. A process that ends does not wait for it, as it may wait for a network."""
        with self._lock:
            is_missing = self._resting == 0
            self._resting -= not is_missing
            self._threads += is_missing
        self._work.put(work)
        if is_missing:
            threading.Thread(target=self._run, name="receiving", daemon=True).start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            with self._lock:
                self._resting += 1

    def take(self, request: Request) -> HTTPConnection:
        """One that was used before, or a new one, which is not connected."""
        parts = urlsplit(request.url)
        with self._lock:
            if idle := self._idle.get((parts.scheme, parts.netloc)):
                return idle.pop()
        if request.context is None:
            return HTTPConnection(parts.netloc, timeout=request.connecting)
        return HTTPSConnection(parts.netloc, timeout=request.connecting, context=request.context)

    def keep(self, request: Request, line: HTTPConnection) -> None:
        """Take back one that is idle."""
        parts = urlsplit(request.url)
        with self._lock:
            self._idle.setdefault((parts.scheme, parts.netloc), []).append(line)

    def close(self) -> None:
        """Close all that are idle, and let the threads end."""
        with self._lock:
            for _ in range(self._threads):
                self._work.put(None)
            for line in (line for idle in self._idle.values() for line in idle):
                line.close()
            self._idle.clear()


def is_proxied(url: str) -> bool:
    """Whether the environment says to reach a server through another one."""
    parts = urlsplit(url)
    return parts.scheme in getproxies() and not proxy_bypass(parts.netloc)


async def receive(lines: Lines, request: Request, start: int, end: int, check: Check) -> memoryview:
    """Some bytes of a file.

    Args:
        lines: Connections to use.
        request: How the file is asked for.
        start: The first byte.
        end: The one after the last.
        check: Looks at the headers before anything is received.

    Raises:
        Odd: If the answer is none that can be dealt with.
        Refused: If the server asks to come again.
        Cut: If the connection ends too early.
        TimeoutError: If nothing comes.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[memoryview] = loop.create_future()
    content = np.empty(end - start, np.uint8).data
    call = _Call(lines, request, start, content, check)

    def settle(error: Exception | None) -> None:
        if not answer.done():
            answer.set_result(content) if error is None else answer.set_exception(error)

    def work() -> None:
        failure = None
        try:
            call.make()
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # The process is ending.
            loop.call_soon_threadsafe(settle, failure)

    lines.start(work)
    try:
        return await answer
    finally:
        call.end()


class _Call:
    """One request, made in a thread of its own; see :func:`receive` for the arguments."""

    def __init__(self, lines: Lines, request: Request, start: int, content: memoryview, check: Check) -> None:
        self._lines, self._request, self._check = lines, request, check
        self._start, self._end, self._content = start, start + len(content), content
        parts = urlsplit(request.url)
        self._target = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
        self._lock = threading.Lock()
        self._line: HTTPConnection | None = None
        self._is_over = False

    def make(self) -> None:
        """Make it, and put what comes where it is to lie."""
        line, response = self._answered()
        try:
            with response:
                self._look_at(response)
                got = response.readinto(self._content)
            if got != len(self._content):
                raise Cut(f"{got:,} bytes came instead of {len(self._content):,}")
        except (OSError, HTTPException) as error:
            line.close()
            if isinstance(error, TimeoutError):
                raise
            raise Cut(str(error)) from error
        except BaseException:
            line.close()
            raise
        with self._lock:
            self._line = None
        if response.will_close:
            line.close()
        else:
            self._lines.keep(self._request, line)

    def end(self) -> None:
        """Nobody waits any more: what is under way is cut off."""
        with self._lock:
            self._is_over = True
            if self._line is not None and self._line.sock is not None:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self._line.sock, socket.SHUT_RDWR)

    def _answered(self) -> tuple[HTTPConnection, HTTPResponse]:
        """A connection, and the answer of which nothing but the headers was received."""
        headers = {**self._request.headers, "Range": f"bytes={self._start}-{self._end - 1}"}
        while True:
            line = self._lines.take(self._request)
            was_used = line.sock is not None
            try:
                if not was_used:
                    line.connect()
                    line.sock.settimeout(self._request.reading)
            except (OSError, HTTPException) as error:
                line.close()
                raise Odd(str(error)) from error
            with self._lock:
                self._line = line
                if self._is_over:
                    line.close()
                    raise Cut("nobody waits for it")
            try:
                line.request("GET", self._target, headers=headers)
                return line, line.getresponse()
            except (OSError, HTTPException) as error:
                line.close()
                if isinstance(error, TimeoutError):
                    raise
                if not was_used:
                    raise Cut(str(error)) from error
                # Servers close connections that were idle for long: another one will do.

    def _look_at(self, response: HTTPResponse) -> None:
        """Make sure that what follows is what was asked for."""
        if response.status in PASSING:
            raise Refused(response.status)
        place = response.getheader("Content-Range", "")
        if (
            response.status != 206
            or response.length != len(self._content)
            or not place.startswith(f"bytes {self._start}-{self._end - 1}/")
            or response.getheader("Content-Encoding", "identity") != "identity"
        ):
            raise Odd(f"status {response.status}, {place}")
        self._check(response.headers)
