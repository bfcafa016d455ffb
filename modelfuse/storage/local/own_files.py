"""Files beside an output that are opened only if they are ours: links are never followed, and nobody else's are used.

A folder that others may write to can hold a link of the name that a lock, a journal or a weight file is to have.
Opened through it, whatever it leads to would be emptied, or taken for ours.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

#: A pipe of that name is not waited for.
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
MODE = 0o666


class NotOurs(OSError):
    """Raised where a path leads to what may be somebody else's.

    Args:
        path: The path.
        what: What is there.
    """

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(errno.EPERM, f"there is {what}, which is not followed or used; remove it", str(path))


def open_new(path: Path, flags: int) -> int:
    """Create a file that is not there yet, and open it.

    Raises:
        OSError: If anything is there already, or it cannot be made.
    """
    return os.open(path, flags | os.O_CREAT | os.O_EXCL | _FLAGS, MODE)


def open_own(path: Path, flags: int) -> int:
    """Open a file that an earlier run has made.

    Raises:
        NotOurs: If it is a link, no regular file, another user's, or has another name elsewhere.
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
            raise NotOurs(path, "no regular file")
        if status.st_uid != os.geteuid():
            raise NotOurs(path, "a file of another user")
        if status.st_nlink > 1:
            raise NotOurs(path, "a file that has another name elsewhere")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_or_create(path: Path, flags: int) -> int:
    """Open a file of ours, made if it is not there.

    Raises:
        NotOurs: As :func:`open_own`.
        OSError: If it cannot be made or opened.
    """
    while True:
        try:
            return open_new(path, flags)
        except FileExistsError:
            try:
                return open_own(path, flags)
            except FileNotFoundError:  # Somebody removed it meanwhile.
                continue


def is_own_folder(path: Path) -> bool:
    """Whether there is a folder of ours, and not a link to one."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
