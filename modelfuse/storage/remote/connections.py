"""Connections of our own to stores, for what is large: a thread for each request, connections that are kept.

The libraries of stores cut what comes and goes into small pieces, all on one thread, and copy it several times. Here
the system takes it from where it lies and puts it where it is to lie, while other threads go on. Nothing unusual is
dealt with: it is :class:`Odd`, and whoever asked asks again through the library.
"""

from __future__ import annotations

import asyncio
import queue
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPSConnection
from typing import Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

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


class Body(Protocol):
    """What is made while it is sent."""

    async def read(self, size: int) -> bytes:
        """The next bytes; none at the end."""


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
    body: bytes | bytearray | Body | None = None

    @property
    def target(self) -> str:
        """The URL without the server."""
        parts = urlsplit(self.url)
        return f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"

    @property
    def is_chunked(self) -> bool:
        """Whether the body says by itself where it ends."""
        return any(name.lower() == "transfer-encoding" for name in self.headers)

    def pieces(self) -> Iterator[memoryview | bytes]:
        """The body as it is sent."""
        if isinstance(self.body, bytes | bytearray):
            whole = memoryview(self.body)
            yield from (whole[start : start + PIECE] for start in range(0, len(whole), PIECE))
        elif self.body is not None:
            with asyncio.Runner() as runner:
                while piece := runner.run(self.body.read(PIECE)):
                    yield piece


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
