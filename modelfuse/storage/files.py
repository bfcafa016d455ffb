"""Positioned reads from files that must not change during a merge."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from msgspec import Struct

from modelfuse.errors import CheckpointError
from modelfuse.storage import PathOrUrl, Url
from modelfuse.storage.url import Entry, Version

Buffer = memoryview


class SourceFile(Struct, frozen=True):
    """An input file, as it was when its header was read.

    Each later opening compares against this, so a checkpoint that is rewritten, truncated or extended during a merge
    is an error instead of being mixed into the output.

    Attributes:
        path: The path.
        size: The size in bytes.
        mtime_ns: The modification time in nanoseconds.
        inode: The inode number; None if another machine has recorded the file, as it may see another number.
        ctime_ns: The status change time, which unlike the modification time cannot be set back; None if ``inode`` is
            None.
    """

    path: PathOrUrl
    size: int
    mtime_ns: int
    inode: int | None
    ctime_ns: int | None

    @staticmethod
    def at(path: PathOrUrl) -> SourceFile:
        """Record the file at ``path``.

        Raises:
            CheckpointError: If it cannot be opened or is not a regular file.
        """
        if isinstance(path, Url):
            return RemoteFile.of(path)
        try:
            status = os.stat(path)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
        if not os.path.isfile(path):
            raise CheckpointError(f"{path} is not a regular file")
        return SourceFile(path, status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns)

    @property
    def identity(self) -> list[object]:
        """What distinguishes it from other files of its name, as JSON."""
        return [self.size, self.mtime_ns, self.inode, self.ctime_ns]

    def expect(self, offset: int, count: int) -> bool:
        """Announce that bytes will be read soon; False if the cache is full, so that it must be announced again."""
        return True

    def __reduce__(self) -> tuple[type[SourceFile], tuple[object, ...]]:
        return SourceFile, (self.path, self.size, self.mtime_ns, None, None)

    @contextmanager
    def open(self) -> Iterator[OpenFile]:
        """Open for positioned reads; stays open within :func:`keeping_open`.

        Raises:
            CheckpointError: If the file is missing or was changed, at opening or at the end of reading.
        """
        kept = _kept.files
        if kept is not None and self in kept:
            yield OpenFile(self.path, self.size, kept[self])
            self._check_unchanged(kept[self])
            return
        try:
            descriptor = os.open(str(self.path), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror}") from error
        keeps = False
        try:
            self._check_unchanged(descriptor)
            yield OpenFile(self.path, self.size, descriptor)
            self._check_unchanged(descriptor)
            keeps = kept is not None and len(kept) < MOST_KEPT_OPEN and self not in kept
            if kept is not None and keeps:
                kept[self] = descriptor
        finally:
            if not keeps:
                os.close(descriptor)

    def _check_unchanged(self, descriptor: int) -> None:
        try:
            status = os.fstat(descriptor)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror}") from error
        found = status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns
        known = self.size, self.mtime_ns, self.inode, self.ctime_ns
        if found != known and any(one is not None and one != other for one, other in zip(known, found, strict=True)):
            raise CheckpointError(
                f"{self.path} was changed while it was being read",
                "Wait until nothing writes to it any more, then merge again.",
            )


class _Kept(threading.local):
    files: dict[SourceFile, int] | None = None


_kept = _Kept()
#: The most files that a thread keeps open.
MOST_KEPT_OPEN = 64


@contextmanager
def keeping_open() -> Iterator[None]:
    """Let this thread keep files open during the context: opening takes longer than reading a small tensor."""
    before, _kept.files = _kept.files, {}
    try:
        yield
    finally:
        for descriptor in _kept.files.values():
            os.close(descriptor)
        _kept.files = before


class OpenFile(Struct, frozen=True):
    """A file that is open for positioned reads; thread-safe.

    Attributes:
        path: The path, for errors.
        size: The size in bytes.
        descriptor: The file descriptor; negative for a remote file.
    """

    path: PathOrUrl
    size: int
    descriptor: int

    def expect(self, offset: int, count: int) -> None:
        """Say that bytes will be read soon."""

    def read(self, offset: int, buffer: Buffer) -> None:
        """Fill ``buffer`` with the bytes at ``offset``, however many system calls it takes.

        Raises:
            CheckpointError: If the file ends before the buffer is full or the disk fails.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self.descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: {error.strerror} at byte {offset + done:,}") from error
            if count == 0:
                raise CheckpointError(f"{self.path} ends at byte {offset + done:,}, in the middle of a tensor")
            done += count


def allow_open_files(count: int) -> None:
    """Raise the limit of open files: all files of an output stay open, and the default limit is about a thousand."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class RemoteFile(SourceFile, frozen=True):
    """An input file in a store, in the version that the store first reported.

    Attributes:
        entry: What the store has reported. Other versions are never read.
    """

    entry: Entry

    @classmethod
    def of(cls, url: Url) -> RemoteFile:
        """Record the file at a URL.

        Raises:
            CheckpointError: If there is no such file, or the store cannot be reached.
        """
        from modelfuse.storage.remote.open_store import store_of

        entry = store_of(url).entry(url)
        if entry is None:
            raise CheckpointError(f"{url} is missing", "Check the URL.")
        return cls(url, entry.size, entry.modified_ns, 0, None, entry)

    def __reduce__(self) -> tuple[type[SourceFile], tuple[object, ...]]:
        return RemoteFile, (self.path, self.size, self.mtime_ns, None, None, self.entry)

    @property
    def identity(self) -> list[object]:
        """Its size, and the store's identifier of this version."""
        return [self.size, self.entry.version]

    @property
    def version(self) -> Version:
        """The URL and the version to fetch."""
        assert isinstance(self.path, Url)
        return Version(self.path, self.entry)

    def expect(self, offset: int, count: int) -> bool:
        """Start to fetch bytes that will be read soon; False if the cache is full."""
        from modelfuse.storage.remote.range_cache import RANGES

        return RANGES.expect(self.version, offset, min(count, self.size - offset))

    @contextmanager
    def open(self) -> Iterator[OpenFile]:
        """Open for positioned reads."""
        yield OpenRemoteFile(self.path, self.size, -1, self)


class OpenRemoteFile(OpenFile, frozen=True):
    """A file in a store, read by ranges.

    Attributes:
        file: The file.
    """

    file: RemoteFile

    def expect(self, offset: int, count: int) -> None:
        """Start to fetch bytes that will be read soon."""
        self.file.expect(offset, count)

    def read(self, offset: int, buffer: Buffer) -> None:
        """Fill ``buffer`` with the bytes at ``offset``, from the range cache.

        Raises:
            CheckpointError: If the file ends before the buffer is full, was changed, or cannot be fetched.
        """
        from modelfuse.storage.remote.range_cache import RANGES

        if offset + len(buffer) > self.size:
            raise CheckpointError(f"{self.path} ends at byte {self.size:,}, in the middle of a tensor")
        RANGES.read(self.file.version, offset, buffer)


def read_whole(path: PathOrUrl) -> bytes:
    """Read a small file.

    Raises:
        CheckpointError: If it cannot be read.
    """
    file = SourceFile.at(path)
    return read_bytes(file, 0, file.size)


def read_bytes(file: SourceFile, offset: int, count: int) -> bytes:
    """Read ``count`` bytes at ``offset``; the caller has checked that the file is long enough."""
    content = bytearray(count)
    with file.open() as opened:
        opened.read(offset, memoryview(content))
    return bytes(content)
