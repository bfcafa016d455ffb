"""Reading bytes at a position from a file that must not change meanwhile."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from modelfuse.errors import CheckpointError
from modelfuse.storage import PathOrUrl, Url
from modelfuse.storage.url import Entry, Version

Buffer = memoryview


@dataclass(frozen=True, slots=True)
class SourceFile:
    """An input file as it was when its header was read.

    Every later opening compares against this, so a checkpoint that is rewritten, cut or
    lengthened during a merge ends the merge instead of being mixed into it.

    Attributes:
        path: Where it is.
        size: Its length in bytes.
        mtime_ns: Its modification time in nanoseconds.
        inode: Its inode number; None where another machine has recorded it, for which it may be another one.
        ctime_ns: When anything of it was changed last, which no program can set back as it can the modification
            time; None where the inode is.
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
        """What tells it from any other file of its name, ready for JSON."""
        return [self.size, self.mtime_ns, self.inode, self.ctime_ns]

    def expect(self, offset: int, count: int) -> bool:
        """Say that bytes will be read soon; False if that is too early: there is no room for them yet."""
        return True

    def __reduce__(self) -> tuple[type[SourceFile], tuple[object, ...]]:
        return SourceFile, (self.path, self.size, self.mtime_ns, None, None)

    @contextmanager
    def open(self) -> Iterator[OpenFile]:
        """Open for positioned reads; kept open for later where :func:`keeping_open` says so.

        Raises:
            CheckpointError: If the file is gone or is no longer the one that was recorded,
                at the opening or at the end of the reading.
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
#: Files that a thread keeps open.
MOST_KEPT_OPEN = 64


@contextmanager
def keeping_open() -> Iterator[None]:
    """Have this thread keep files open meanwhile, as opening one takes longer than reading a small tensor."""
    before, _kept.files = _kept.files, {}
    try:
        yield
    finally:
        for descriptor in _kept.files.values():
            os.close(descriptor)
        _kept.files = before


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file that is open for positioned reads, from any thread.

    Attributes:
        path: What it is called in errors.
        size: Its length in bytes.
        descriptor: What the system knows it by.
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
    """All files of an output stay open; systems allow a thousand unless asked for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@dataclass(frozen=True, slots=True)
class RemoteFile(SourceFile):
    """An input file in a store, as it was when the store was first asked.

    Attributes:
        entry: What the store said of it. Another version is never read.
    """

    entry: Entry

    @classmethod
    def of(cls, url: Url) -> RemoteFile:
        """Record the file at a URL.

        Raises:
            CheckpointError: If there is none, or the store cannot be asked.
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
        """Its size, and what the store calls this version of it."""
        return [self.size, self.entry.version]

    @property
    def version(self) -> Version:
        """What is fetched."""
        assert isinstance(self.path, Url)
        return Version(self.path, self.entry)

    def expect(self, offset: int, count: int) -> bool:
        """Send for bytes that will be read soon; False if there is no room for them yet."""
        from modelfuse.storage.remote.range_cache import RANGES

        return RANGES.expect(self.version, offset, min(count, self.size - offset))

    @contextmanager
    def open(self) -> Iterator[OpenFile]:
        """Open for positioned reads."""
        yield OpenRemoteFile(self.path, self.size, -1, self)


@dataclass(frozen=True, slots=True)
class OpenRemoteFile(OpenFile):
    """A file in a store, from which ranges are fetched.

    Attributes:
        file: Which.
    """

    file: RemoteFile

    def expect(self, offset: int, count: int) -> None:
        """Send for bytes that will be read soon."""
        self.file.expect(offset, count)

    def read(self, offset: int, buffer: Buffer) -> None:
        """Fill ``buffer`` with the bytes at ``offset``, from where they were fetched or are on their way.

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
    """Read ``count`` bytes at ``offset``; the caller has checked that they lie in the file."""
    content = bytearray(count)
    with file.open() as opened:
        opened.read(offset, memoryview(content))
    return bytes(content)
