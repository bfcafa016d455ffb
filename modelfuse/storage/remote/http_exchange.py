"""Requests over connections of our own: made in another thread, awaited on fsspec's."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from email.message import Message
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Generic, TypeVar

import numpy as np

from modelfuse.storage.remote.connections import Lines, Odd, Refused, Request
from modelfuse.storage.remote.errors import PASSING, Cut

T = TypeVar("T")
#: Raises what is wrong with an answer, by its headers.
Check = Callable[[Message], None]


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
                body = request.pieces() if request.body is not None else None
                headers, is_chunked = dict(request.headers), request.is_chunked
                line.request(request.method, request.target, body, headers, encode_chunked=is_chunked)
                return line, line.getresponse()
            except (OSError, HTTPException) as error:
                line.close()
                if isinstance(error, TimeoutError) or not was_used:
                    raise
                # Servers close connections that were idle for long: another one will do.
