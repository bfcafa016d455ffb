"""The journal of a merge: records finished spans in a file, from which the next run can resume.

A line is a JSON entry after a checksum of it and of all lines before it. So reading stops at the first line that is
torn, changed or from another journal. Data is synced before its entry is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import xxhash

from modelfuse.storage.local.own_files import open_or_create, open_own

#: The longest valid line; bounds the memory for a file without line breaks.
LONGEST_LINE = 1 << 26

#: Bytes per write. Linux caches a write in memory blocks of its size, up to 2 MiB, and a virtual machine returns its
#: largest free blocks to the host: getting those back costs up to 2 s per GB.
PIECE = 512 << 10

#: macOS has no fdatasync.
sync_data: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)


class Journal:
    """An append-only file of entries, created with the first one.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        self._end = 0
        self._sum = 0

    def read(self) -> Iterator[object]:
        """The valid entries, in order; later entries are appended after the last one that was read."""
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
            return  # Missing or unreadable: only what was read so far is valid.

    def append(self, entries: Sequence[object]) -> None:
        """Write entries and sync them.

        Raises:
            OSError: If they cannot be written; earlier entries stay valid.
        """
        lines = bytearray()
        checksum = self._sum
        for entry in entries:
            text = json.dumps(entry, separators=(",", ":")).encode()
            checksum = xxhash.xxh3_64_intdigest(text, checksum)
            lines += b"%016x %s\n" % (checksum, text)
        is_new = self._descriptor < 0
        if is_new:
            # An existing file without valid entries is overwritten.
            self._descriptor = open_or_create(self.path, os.O_WRONLY)
            os.truncate(self._descriptor, self._end)
        write_all(self._descriptor, memoryview(lines), self._end)
        sync_data(self._descriptor)
        if is_new:
            sync_folder(self.path.parent)
        self._sum, self._end = checksum, self._end + len(lines)

    @property
    def exists(self) -> bool:
        """Whether it has entries, of this run or an earlier one."""
        return self._end > 0

    def remove(self) -> None:
        """Remove the file and sync the folder, so that it does not reappear after a power failure.

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
        """Close the file."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all bytes at an offset of a file; thread-safe.

    Raises:
        OSError: If the disk is full or fails.
    """
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + PIECE], offset + done)


def sync_folder(path: Path) -> None:
    """Sync a folder: makes created, renamed and removed entries durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
