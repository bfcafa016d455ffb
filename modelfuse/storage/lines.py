"""Connections of our own to stores, for what is large: a thread for each request, connections that are kept.

The libraries of stores cut what comes and goes into small pieces, all on one thread, and copy it several times. Here
the system takes it from where it lies and puts it where it is to lie, while other threads go on. Nothing unusual is
dealt with: it is :class:`Odd`, and whoever asked asks again through the library.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from email.message import Message
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Generic, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import numpy as np

from modelfuse.storage.troubles import PASSING, Cut

T = TypeVar("T")
#: Raises what is wrong with an answer, by its headers.
Check = Callable[[Message], None]
#: Bytes that are sent at a time: each has its own time limit.
PIECE = 1 << 18


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
    """What is sent.

    Attributes:
        method: What is wanted.
        url: Of what.
        headers: As the library would send them.
        context: How the server proves who it is; None: it need not.
        connecting: Seconds that connecting may take.
        reading: Seconds without a byte.
        body: What follows the headers.
    """

    method: str
    url: str
    headers: Mapping[str, str]
    context: ssl.SSLContext | None
    connecting: float
    reading: float
    body: bytes | bytearray | None = None

    @property
    def target(self) -> str:
        """The URL without the server."""
        parts = urlsplit(self.url)
        return f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"

    def pieces(self) -> Iterator[memoryview] | None:
        """The body as it is sent."""
        if self.body is None:
            return None
        whole = memoryview(self.body)
        return (whole[start : start + PIECE] for start in range(0, len(whole), PIECE))


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
            threading.Thread(target=self._run, name="line", daemon=True).start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            del work
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


async def exchange(lines: Lines, request: Request, take: Callable[[HTTPResponse], T]) -> T:
    """Make a request.

    Args:
        lines: Connections to use.
        request: What is sent.
        take: Makes of an answer, in another thread, what is returned.

    Raises:
        Odd: If the answer is none that can be dealt with here.
        Refused: If the server asks to come again.
        Cut: If the connection ends too early.
        TimeoutError: If nothing comes.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()
    call = _Call(lines, request, take)

    def settle() -> None:
        if answer.done():
            return
        if call.failure is not None:
            answer.set_exception(call.failure)
        else:
            answer.set_result(call.outcome)

    def work() -> None:
        call.make()
        with contextlib.suppress(RuntimeError):  # The process is ending.
            loop.call_soon_threadsafe(settle)

    lines.start(work)
    try:
        return await answer
    finally:
        call.end()


async def receive(lines: Lines, request: Request, start: int, end: int, check: Check) -> memoryview:
    """Some bytes of a file; raises what :func:`exchange` does.

    Args:
        lines: Connections to use.
        request: How all of the file is asked for.
        start: The first byte.
        end: The one after the last.
        check: Looks at the headers before anything is received.
    """
    content = np.empty(end - start, np.uint8).data

    def take(response: HTTPResponse) -> memoryview:
        look_at(response, 206)
        place = response.getheader("Content-Range", "")
        if (
            response.length != len(content)
            or not place.startswith(f"bytes {start}-{end - 1}/")
            or response.getheader("Content-Encoding", "identity") != "identity"
        ):
            raise Odd(f"another range: {place}")
        check(response.headers)
        got = response.readinto(content)
        if got != len(content):
            raise Cut(f"{got:,} bytes came instead of {len(content):,}")
        return content

    headers = {**request.headers, "Range": f"bytes={start}-{end - 1}"}
    return await exchange(lines, replace(request, headers=headers), take)


def look_at(response: HTTPResponse, status: int) -> None:
    """Make sure that an answer is of one kind.

    Raises:
        Refused: If the server asks to come again.
        Odd: If it is any other.
    """
    if response.status in PASSING:
        raise Refused(response.status)
    if response.status != status:
        raise Odd(f"status {response.status}")


class _Call(Generic[T]):
    """One request, made in a thread of its own; see :func:`exchange` for the arguments.

    Attributes:
        outcome: What it came to.
        failure: Why it came to nothing.
    """

    outcome: T

    def __init__(self, lines: Lines, request: Request, take: Callable[[HTTPResponse], T]) -> None:
        self.failure: Exception | None = None
        self._lines, self._request, self._take = lines, request, take
        self._lock = threading.Lock()
        self._line: HTTPConnection | None = None
        self._is_over = False

    def make(self) -> None:
        """Make it, and set what came of it."""
        try:
            line, response = self._answered()
            try:
                with response:
                    self.outcome = self._take(response)
            except BaseException:
                line.close()
                raise
            with self._lock:
                self._line = None
            if response.will_close:
                line.close()
            else:
                self._lines.keep(self._request, line)
        except TimeoutError as error:
            self.failure = error
        except (OSError, HTTPException) as error:
            self.failure = Cut(str(error))
            self.failure.__cause__ = error
        except Exception as error:
            self.failure = error

    def end(self) -> None:
        """Nobody waits any more: what is under way is cut off."""
        with self._lock:
            self._is_over = True
            if self._line is not None and self._line.sock is not None:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self._line.sock, socket.SHUT_RDWR)

    def _answered(self) -> tuple[HTTPConnection, HTTPResponse]:
        """A connection, and the answer of which nothing but the headers was received."""
        request = self._request
        while True:
            line = self._lines.take(request)
            was_used = line.sock is not None
            try:
                if not was_used:
                    line.connect()
                    line.sock.settimeout(request.reading)
            except (OSError, HTTPException) as error:
                line.close()
                raise Odd(str(error)) from error
            with self._lock:
                self._line = line
                if self._is_over:
                    line.close()
                    raise Cut("nobody waits for it")
            try:
                line.request(request.method, request.target, request.pieces(), dict(request.headers))
                return line, line.getresponse()
            except (OSError, HTTPException) as error:
                line.close()
                if isinstance(error, TimeoutError) or not was_used:
                    raise
                # Servers close connections that were idle for long: another one will do.
