"""A lock file that prevents two merges into one output; released when its process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from modelfuse.errors import OutputError
from modelfuse.storage.local.own_files import open_or_create


class Lock:
    """A lock file. A merge is running if it is locked, not if it exists.

    Args:
        path: The file.
        guarded: The output that it guards, for messages.
    """

    def __init__(self, path: Path, guarded: Path) -> None:
        self._path, self._guarded = path, guarded
        self._descriptor = -1

    def acquire(self) -> None:
        """Take the lock, or fail at once and name the process that holds it.

        Raises:
            OutputError: If another process, or another thread of this one, holds it.
            OSError: If the file cannot be created or locked, or belongs to another user.
        """
        while self._descriptor < 0:
            descriptor = open_or_create(self._path, os.O_RDWR)
            try:
                self._lock(descriptor)
                if is_same_file(descriptor, self._path):
                    os.truncate(descriptor, 0)
                    os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
                    self._descriptor = descriptor
                    return
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # Its holder has removed it meanwhile.

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
            raise OutputError(
                f"Another merge is writing to {self._guarded}" + (f" ({holder})" if holder else ""),
                "Wait until it ends, or choose another output_path.",
            ) from None

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            with contextlib.suppress(OSError):  # A leftover file does no harm.
                os.unlink(self._path)
            with contextlib.suppress(OSError):
                os.close(descriptor)


def is_same_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
