"""Open files beside an output only if this user owns them, and never through links.

In a folder that others may write to, a link may have the name of a lock, journal or weight file: opening it would
truncate its target, or use another user's file.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

#: O_NONBLOCK: opening a pipe of that name must not block.
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
MODE = 0o666


class NotOurs(OSError):
    """Raised if a path is a link or belongs to another user.

    Args:
        path: The path.
        what: What it is.
    """

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(errno.EPERM, f"there is {what}, which is not followed or used; remove it", str(path))


def open_new(path: Path, flags: int) -> int:
    """Create and open a new file.

    Raises:
        OSError: If the path exists, or the file cannot be created.
    """
    return os.open(path, flags | os.O_CREAT | os.O_EXCL | _FLAGS, MODE)


def open_own(path: Path, flags: int) -> int:
    """Open a file that an earlier run has created.

    Raises:
        NotOurs: If it is a link, not a regular file, another user's, or has further hard links.
        OSError: If it cannot be opened.
    """
    try:
        descriptor = os.open(path, flags | _FLAGS)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotOurs(path, "a link") from error
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise NotOurs(path, "something that is not a regular file")
        if status.st_uid != os.geteuid():
            raise NotOurs(path, "a file of another user")
        if status.st_nlink > 1:
            raise NotOurs(path, "a file with several hard links")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_or_create(path: Path, flags: int) -> int:
    """Open a file that this user owns, or create it.

    Raises:
        NotOurs: As :func:`open_own`.
        OSError: If it cannot be created or opened.
    """
    while True:
        try:
            return open_new(path, flags)
        except FileExistsError:
            try:
                return open_own(path, flags)
            except FileNotFoundError:  # Removed meanwhile.
                continue


def is_own_folder(path: Path) -> bool:
    """Whether this is a folder (not a link to one) that this user owns."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
