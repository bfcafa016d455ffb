"""What holds objects: listed, asked and read through fsspec, with several requests at a time.

fsspec runs the requests of all stores on one thread; here they are handed to it as futures. Each is tried again while
that may help, and none is waited for without end.
"""

from __future__ import annotations

import asyncio
import email.utils
import functools
import itertools
import random
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from typing import Any, TypeVar

from modelfuse.errors import CheckpointError, ModelfuseError
from modelfuse.storage.remote.errors import Cut, Replaced, is_missing, is_passing, told
from modelfuse.storage.url import Entry, Url

T = TypeVar("T")
#: Bytes that were fetched.
Content = bytes | memoryview
#: How often a request is made, how long the first pause is (each is twice the one before), and how long one may take.
#: The libraries give up much sooner where nothing comes at all.
ATTEMPTS = 6
PAUSE = 0.2
SECONDS = 300.0
#: Requests to one store at a time, and the connections for them.
REQUESTS = 32
CONNECTIONS = 2 * REQUESTS


class Store:
    """A store that fsspec knows.

    Args:
        fs: fsspec's file system.
    """

    #: Whether it tells all names in a folder.
    lists = True

    def __init__(self, fs: Any) -> None:
        self.fs = fs
        self._listings: dict[str, dict[str, Entry | None]] = {}
        self._lock = threading.Lock()
        self._free = asyncio.Semaphore(REQUESTS)
        self._pool = ThreadPoolExecutor(CONNECTIONS, "store") if not fs.async_impl else None

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
            known = self.wait(folder, self.list_now(folder))
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
        return self.wait(url, self.ask(url))

    async def ask(self, url: Url) -> Entry | None:
        """The same, asked now; to be awaited on fsspec's thread."""
        return await self.attempt(lambda: self._ask(url))

    async def list_now(self, folder: Url) -> dict[str, Entry | None]:
        """The listing as it is now; to be awaited on fsspec's thread."""
        return await self.attempt(lambda: self._list(folder))

    def look_up(self, folder: Url, names: Iterable[str]) -> None:
        """Make sure that the listing of a folder knows these files, if they are there."""
        self.listing(folder)

    def forget(self) -> None:
        """Ask again from now on."""
        with self._lock:
            self._listings.clear()

    async def _list(self, folder: Url) -> dict[str, Entry | None]:
        try:
            found = await self.call("ls", self.address(folder), detail=True, refresh=True)
        except Exception as error:
            if is_missing(error) and not self._is_wrong(error):
                return {}
            raise
        return self.entries(self.address(folder), found)

    @classmethod
    def entries(cls, folder: str, found: Iterable[Mapping[str, Any]]) -> dict[str, Entry | None]:
        """What fsspec says of the files and folders in one, by name."""
        entries = {
            each["name"].rstrip("/").rpartition("/")[2]: cls.entry_of(each) if each["type"] == "file" else None
            for each in found
            if each["name"].strip("/") != folder.strip("/")
        }
        return dict(sorted(entries.items()))

    async def _ask(self, url: Url) -> Entry | None:
        try:
            found = await self.call("info", self.address(url))
        except Exception as error:
            if is_missing(error) and not self._is_wrong(error):
                return None
            raise
        return self.entry_of(found) if found["type"] == "file" else None

    def _is_wrong(self, error: BaseException) -> bool:
        """Whether something is missing that should be there whatever is in it."""
        return False

    @staticmethod
    def entry_of(info: Mapping[str, Any]) -> Entry:
        """What fsspec's description of a file comes to."""
        modified = next((info[key] for key in ("LastModified", "mtime", "last_modified", "updated", "modified",
                                               "created", "Last-Modified") if info.get(key)), 0)  # fmt: skip
        versions = [str(info[key]) for key in ("ETag", "etag", "generation", "versionId") if info.get(key)]
        modified_ns = _nanoseconds(modified)
        return Entry(int(info["size"]), " ".join(versions) or str(modified_ns), modified_ns)

    # --- ranges ------------------------------------------------------------------------------------------------

    def fetch(self, url: Url, entry: Entry, start: int, end: int) -> Future[Content]:
        """Send for some bytes of a file.

        Returns:
            What fails with whatever the libraries raise; :func:`told` makes sense of it.
        """
        attempts = itertools.count()

        async def once() -> Content:
            content = await self._range(url, entry, start, end, next(attempts))
            if len(content) != end - start:
                raise Cut(f"{len(content):,} bytes came instead of {end - start:,}")
            return content

        return self.submit(self.in_turn(once))

    async def _range(self, url: Url, entry: Entry, start: int, end: int, attempt: int) -> Content:
        """The same, by a store that cannot be told which version is meant: it is asked for it afterwards."""
        content: bytes = await self.call("cat_file", self.address(url), start=start, end=end)
        if self.entry_of(await self.call("info", self.address(url))) != entry:
            raise Replaced
        return content

    # --- requests ----------------------------------------------------------------------------------------------

    def address(self, url: Url) -> str:
        """What fsspec calls it."""
        return str(self.fs._strip_protocol(url.address))

    async def call(self, method: str, *args: Any, **options: Any) -> Any:
        """One of the file system's methods, off this thread if it would hold it up."""
        if self._pool is None:
            return await getattr(self.fs, f"_{method}")(*args, **options)
        work = functools.partial(getattr(self.fs, method), *args, **options)
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def attempt(self, request: Callable[[], Awaitable[T]]) -> T:
        """Make a request, and again after a pause while that may help."""
        for number in range(ATTEMPTS):
            try:
                async with asyncio.timeout(SECONDS):
                    return await request()
            except Exception as error:
                if number + 1 == ATTEMPTS or not is_passing(error):
                    raise
            await asyncio.sleep(PAUSE * 2**number * random.uniform(0.5, 1.5))
        raise AssertionError("there is at least one attempt")

    async def in_turn(self, request: Callable[[], Awaitable[T]]) -> T:
        """Make a large request when others have ended: what waits in a queue is not late."""
        async with self._free:
            return await self.attempt(request)

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start on fsspec's thread."""
        from fsspec.asyn import get_loop

        return asyncio.run_coroutine_threadsafe(work, get_loop())

    def wait(self, url: Url, work: Coroutine[Any, Any, T], kind: type[ModelfuseError] = CheckpointError) -> T:
        """The result of a request.

        Raises:
            ModelfuseError: Of the given kind, if it fails.
        """
        future = self.submit(work)
        try:
            return future.result()
        except Exception as error:
            raise told(url, error, kind) from error
        finally:
            future.cancel()


def _nanoseconds(moment: object) -> int:
    if isinstance(moment, str):
        try:
            moment = datetime.fromisoformat(moment)
        except ValueError:
            try:
                moment = email.utils.parsedate_to_datetime(str(moment))
            except ValueError:
                return 0
    if isinstance(moment, datetime):
        return int(moment.timestamp()) * 10**9 + moment.microsecond * 1000
    return round(moment * 1e6) * 1000 if isinstance(moment, int | float) else 0
