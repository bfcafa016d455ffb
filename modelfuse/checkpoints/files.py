"""Reading bytes at a position from a file that must not change meanwhile."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from modelfuse.errors import CheckpointError

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
    """

    path: Path
    size: int
    mtime_ns: int
    inode: int | None

    @classmethod
    def at(cls, path: Path) -> SourceFile:
        """Record the file at ``path``.

        Raises:
            CheckpointError: If it cannot be opened or is not a regular file.
        """
        try:
            status = os.stat(path)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
        if not os.path.isfile(path):
            raise CheckpointError(f"{path} is not a regular file")
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ino)

    def __reduce__(self) -> tuple[type[SourceFile], tuple[Path, int, int, None]]:
        return SourceFile, (self.path, self.size, self.mtime_ns, None)

    @contextmanager
    def open(self) -> Iterator[OpenFile]:
        """Open for positioned reads.

        Raises:
            CheckpointError: If the file is gone or is no longer the one that was recorded,
                at the opening or at the end of the reading.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror}") from error
        try:
            self._check_unchanged(descriptor)
            yield OpenFile(self.path, self.size, descriptor)
            self._check_unchanged(descriptor)
        finally:
            os.close(descriptor)

    def _check_unchanged(self, descriptor: int) -> None:
        try:
            status = os.fstat(descriptor)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror}") from error
        known = self.size, self.mtime_ns, status.st_ino if self.inode is None else self.inode
        if (status.st_size, status.st_mtime_ns, status.st_ino) != known:
            raise CheckpointError(
                f"{self.path} was changed while it was being read",
                "Wait until nothing writes to it any more, then merge again.",
            )


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file that is open for positioned reads, from any thread.

    Attributes:
        path: What it is called in errors.
        size: Its length in bytes.
        descriptor: What the system knows it by.
    """

    path: Path
    size: int
    descriptor: int

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


def read_bytes(file: SourceFile, offset: int, count: int) -> bytes:
    """Read ``count`` bytes at ``offset``; the caller has checked that they lie in the file."""
    content = bytearray(count)
    with file.open() as opened:
        opened.read(offset, memoryview(content))
    return bytes(content)
