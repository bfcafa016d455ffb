"""Files on their way into a store: sent while they are made, seen when they are completed, or never.

To S3, parts of a file go as soon as all their bytes are there, in any order. To other stores a file goes from front to
back under a hidden name, and is renamed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from typing import Any, Protocol

from modelfuse.errors import OutputError
from modelfuse.storage.remote.errors import is_missing, told
from modelfuse.storage.remote.range_cache import LOOK, RANGES
from modelfuse.storage.remote.s3_and_http import HttpStore, S3Store
from modelfuse.storage.remote.stores import Store
from modelfuse.storage.url import Url

#: Bytes of a part, unless that makes more parts than a file may have. Smaller files go in one request.
PART = 8 << 20
MOST_PARTS = 10_000
LEAST_PART = 1 << 20
#: Parts on their way at a time.
UNDER_WAY = 8
#: How a file is called before it is whole, where a store has no uploads by parts.
HIDDEN = ".modelfuse-"


class Upload(Protocol):
    """One file on its way. Written from any thread; completed or abandoned by one."""

    url: Url

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Take some of its bytes; waits while too many are under way."""

    def close(self) -> None:
        """Send what is left, when all was written."""

    async def complete(self) -> None:
        """Make it seen; when all that was sent has arrived."""

    async def abandon(self) -> None:
        """Leave nothing of it."""


class Gate:
    """Lets so many requests be under way at a time, and remembers the first that failed."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._under_way: set[Future[None]] = set()
        self._failure: BaseException | None = None

    def start(self, store: Store, url: Url, work: Coroutine[Any, Any, None]) -> None:
        """Begin a request when there is room for it.

        Raises:
            OutputError: If an earlier one has failed.
        """
        try:
            with self._changed:
                while self._failure is None and len(self._under_way) >= UNDER_WAY:
                    self._changed.wait(LOOK)
                    RANGES.check()
                self.check()
                future = store.submit(work)
                self._under_way.add(future)
        except BaseException:
            work.close()
            raise
        future.add_done_callback(lambda done: self._done(url, done))

    def drain(self) -> None:
        """Wait until all have ended.

        Raises:
            OutputError: If one has failed.
        """
        with self._changed:
            while self._under_way and self._failure is None:
                self._changed.wait(LOOK)
            self.check()

    def check(self) -> None:
        """Make sure that none has failed.

        Raises:
            OutputError: If one has.
        """
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Cancel what is under way, and wait until it is."""
        with self._changed:
            pending = set(self._under_way)
        for future in pending:
            future.cancel()
        wait(pending)

    def _done(self, url: Url, future: Future[None]) -> None:
        with self._changed:
            self._under_way.discard(future)
            error = None if future.cancelled() else future.exception()
            if error is not None and self._failure is None:
                self._failure = told(url, error, OutputError)
                self._failure.__cause__ = error
            self._changed.notify_all()


class S3Upload:
    """A file that goes to S3 by parts.

    Args:
        store: Where to.
        url: Its name.
        size: Its size, if that is known. Otherwise it is written from front to back.
        gate: Bounds what is under way.
    """

    def __init__(self, store: S3Store, url: Url, size: int | None, gate: Gate) -> None:
        self.url, self._store, self._size, self._gate = url, store, size, gate
        bucket, key, _ = store.fs.split_path(store.address(url))
        self._object = {"Bucket": bucket, "Key": key}
        self._part = max(PART, -(-(size or 0) // MOST_PARTS))
        self._lock = threading.Lock()
        self._parts: dict[int, bytearray] = {}
        self._filled: dict[int, int] = {}
        self._written = 0
        self._begun = asyncio.Lock()
        self._id: str | None = None
        self._sent: dict[int, str] = {}
        self._whole: bytes | None = None

    def write(self, offset: int, data: memoryview | bytes) -> None:
        begin, end = offset, offset + len(data)
        while begin < end:
            number = begin // self._part
            first = number * self._part
            stop = min(end, first + self._part)
            with self._lock:
                part = self._parts.get(number)
                if part is None:
                    part = self._parts[number] = bytearray(self._length(number))
            memoryview(part)[begin - first : stop - first] = memoryview(data)[begin - offset : stop - offset]
            with self._lock:
                self._filled[number] = self._filled.get(number, 0) + stop - begin
                self._written += stop - begin
                is_full = self._filled[number] == self._length(number)
            if is_full:
                self._send(number)
            begin = stop

    def close(self) -> None:
        for number in sorted(self._parts):
            self._send(number)
        if not self._written:
            self._whole = b""

    async def complete(self) -> None:
        if self._whole is not None:
            content = self._whole
            await self._store.attempt(lambda: self._call("put_object", Body=content))
            return
        parts = [{"PartNumber": number + 1, "ETag": tag} for number, tag in sorted(self._sent.items())]
        try:
            await self._store.attempt(
                lambda: self._call("complete_multipart_upload", UploadId=self._id, MultipartUpload={"Parts": parts})
            )
        except Exception as error:
            # An answer that was lost: the next attempt finds no upload, as it is an object by now.
            there = await self._store.ask(self.url) if is_missing(error) else None
            if there is None or there.size != self._written:
                raise

    async def abandon(self) -> None:
        async with self._begun:
            upload, self._id = self._id, None
        if upload is not None:
            await self._store.attempt(lambda: self._call("abort_multipart_upload", UploadId=upload))

    def _length(self, number: int) -> int:
        left = self._part if self._size is None else self._size - number * self._part
        return min(self._part, left)

    def _send(self, number: int) -> None:
        with self._lock:
            content = self._parts.pop(number)
        del content[self._filled[number] :]
        if number == 0 and len(content) < LEAST_PART:  # It is all there is.
            self._whole = bytes(content)
        else:
            self._gate.start(self._store, self.url, self._send_part(number, content))

    async def _send_part(self, number: int, content: bytearray) -> None:
        async with self._begun:
            if self._id is None:
                begun = await self._store.attempt(lambda: self._call("create_multipart_upload"))
                self._id = begun["UploadId"]
        options = {**self._object, "UploadId": self._id, "PartNumber": number + 1}
        attempts = itertools.count()
        send = self._store.send_part
        self._sent[number] = await self._store.in_turn(lambda: send(next(attempts), content, **options))

    async def _call(self, method: str, **options: Any) -> Any:
        return await self._store.fs._call_s3(method, **self._object, **options)


class HiddenUpload:
    """A file that is written from front to back under another name; see :class:`S3Upload` for the arguments."""

    def __init__(self, store: Store, url: Url, gate: Gate) -> None:
        self.url, self._store = url, store
        self._hidden = url.with_name(f"{HIDDEN}{url.name}")
        self._lock = threading.Lock()
        self._pieces: dict[int, bytes] = {}
        self._next = 0
        self._file: Any = None

    def write(self, offset: int, data: memoryview | bytes) -> None:
        with self._lock:
            self._pieces[offset] = bytes(data)
            try:
                file = self._opened()
                while self._next in self._pieces:
                    piece = self._pieces.pop(self._next)
                    file.write(piece)
                    self._next += len(piece)
            except Exception as error:
                raise told(self.url, error, OutputError) from error

    def close(self) -> None:
        try:
            with self._lock:
                self._opened().close()
        except Exception as error:
            raise told(self.url, error, OutputError) from error

    async def complete(self) -> None:
        await self._store.call("mv_file" if hasattr(self._store.fs, "mv_file") else "mv", *self._names())

    async def abandon(self) -> None:
        if self._file is not None:
            with contextlib.suppress(Exception):
                self._file.close()
            await self._store.call("rm_file", self._names()[0])

    def _names(self) -> tuple[str, str]:
        return self._store.address(self._hidden), self._store.address(self.url)

    def _opened(self) -> Any:
        if self._file is None:
            self._store.fs.makedirs(self._store.address(self.url.parent), exist_ok=True)
            self._file = self._store.fs.open(self._names()[0], "wb")
        return self._file


def begin(store: Store, url: Url, size: int | None, gate: Gate) -> Upload:
    """Begin a file.

    Raises:
        OutputError: If such a store cannot be written to.
    """
    if isinstance(store, HttpStore):
        raise OutputError(f"{url} cannot be written: a web server takes no files", "Choose another output_path.")
    return S3Upload(store, url, size, gate) if isinstance(store, S3Store) else HiddenUpload(store, url, gate)


async def remove(store: Store, urls: list[Url]) -> None:
    """Remove files, those that are not there included."""

    async def one(url: Url) -> None:
        try:
            await store.attempt(lambda: store.call("rm_file", store.address(url)))
        except Exception as error:
            if not is_missing(error):
                raise

    await asyncio.gather(*map(one, urls))


async def clear(store: Store, folder: Url) -> None:
    """Remove what uploads to a folder have left that were never completed: of this run, or of one that was killed."""
    if not isinstance(store, S3Store):
        left = [folder / name for name in await store.list_now(folder) if name.startswith(HIDDEN)]
        await remove(store, left)
        return
    bucket, key, _ = store.fs.split_path(store.address(folder))
    options: dict[str, str] = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", "Delimiter": "/"}
    while True:
        page = await store.attempt(functools.partial(store.fs._call_s3, "list_multipart_uploads", **options))
        for each in page.get("Uploads", ()):
            found = {"Bucket": bucket, "Key": each["Key"], "UploadId": each["UploadId"]}
            with contextlib.suppress(FileNotFoundError):  # Another one has been quicker.
                await store.fs._call_s3("abort_multipart_upload", **found)
        if not page.get("IsTruncated"):
            return
        options |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page.get("NextUploadIdMarker", "")}
