"""What a merge has finished, in a file that one which was killed leaves to the next.

A line is an entry in JSON behind a checksum of it and of all lines before it. So a line that is torn, changed or
not this journal's ends what is trusted. Whoever writes an entry has synced first what it speaks of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import xxhash

from modelfuse.storage.local.own_files import open_or_create, open_own

#: No entry is longer; a file without ends of lines is not read into memory.
LONGEST_LINE = 1 << 26

#: Bytes written at a time. Linux keeps what one write brings in blocks of memory as large as the write, up to 2 MiB,
#: and a virtual machine gives its host the largest free blocks back: to take those again costs up to 2 s a GB.
PIECE = 512 << 10

#: macOS has no fdatasync.
sync_data: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)


class Journal:
    """An append-only file of entries; made when the first one is written.

    Args:
        path: Where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        self._end = 0
        self._sum = 0

    def read(self) -> Iterator[object]:
        """The entries that can be trusted, in order; what is appended later follows the last one taken."""
        try:
            with open(open_own(self.path, os.O_RDONLY), "rb") as file:
                while (line := file.readline(LONGEST_LINE)).endswith(b"\n"):
                    digits, _, text = line[:-1].partition(b" ")
                    checksum = xxhash.xxh3_64_intdigest(text, self._sum)
                    if digits != b"%016x" % checksum:
                        return
                    entry = json.loads(text)
                    self._sum, self._end = checksum, self._end + len(line)
                    yield entry
        except (OSError, ValueError):
            return  # Gone, or the disk cannot give it back: what was read so far is what can be trusted.

    def append(self, entries: Sequence[object]) -> None:
        """Write entries and sync them.

        Raises:
            OSError: If they cannot be written; what was written before stays trusted.
        """
        lines = bytearray()
        checksum = self._sum
        for entry in entries:
            text = json.dumps(entry, separators=(",", ":")).encode()
            checksum = xxhash.xxh3_64_intdigest(text, checksum)
            lines += b"%016x %s\n" % (checksum, text)
        is_new = self._descriptor < 0
        if is_new:
            # One that is there and cannot be trusted, as the disk has failed, is written afresh.
            self._descriptor = open_or_create(self.path, os.O_WRONLY)
            os.truncate(self._descriptor, self._end)
        write_all(self._descriptor, memoryview(lines), self._end)
        sync_data(self._descriptor)
        if is_new:
            sync_folder(self.path.parent)
        self._sum, self._end = checksum, self._end + len(lines)

    @property
    def exists(self) -> bool:
        """Whether anything was written or taken from an earlier run."""
        return self._end > 0

    def remove(self) -> None:
        """Remove the file for good, so that not even a power cut brings it back.

        Raises:
            OSError: If it cannot be removed.
        """
        self.close()
        self._end = self._sum = 0
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            return
        sync_folder(self.path.parent)

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write bytes at an offset of a file, however many system calls it takes; safe from any thread.

    Raises:
        OSError: If the disk is full or fails.
    """
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + PIECE], offset + done)


def sync_folder(path: Path) -> None:
    """Make what was created, renamed or removed in a folder last."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
