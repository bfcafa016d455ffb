"""Files that nobody else can have written: what is loaded from them is run.

A folder or file is trusted if it is the effective user's or root's, and nobody else may write to it. So are the folders
that it is in, up to the root: who may write to one of them can put another folder in the place of this one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER_MODE, FILE_MODE = 0o700, 0o600
#: A link is not followed, a pipe not waited for.
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextmanager
def private_folder(path: Path, make: bool = False) -> Iterator[int]:
    """Open a folder whose files may be trusted.

    Args:
        path: The folder.
        make: Whether to create what is missing of it, for this user alone.

    Returns:
        What gives its descriptor.

    Raises:
        OSError: If it is not there, cannot be made, or somebody else may write to it.
    """
    path = Path(os.path.realpath(path))
    for parent in reversed(path.parents):
        if make:
            _make(parent)
        _check(path, os.lstat(parent), sticky=True)
    if make:
        _make(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _FLAGS)
    try:
        _check(path, os.fstat(descriptor))
        yield descriptor
    finally:
        os.close(descriptor)


def read_private(folder: int, name: str) -> bytes:
    """Read a file of a folder.

    Raises:
        OSError: If it is no file that may be trusted.
    """
    descriptor = os.open(name, os.O_RDONLY | _FLAGS, dir_fd=folder)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PermissionError(f"{name} is no regular file")
        _check(name, status)
        return file.read()


def write_private(folder: int, name: str, content: bytes) -> None:
    """Write a file of a folder whole or not at all, for this user alone.

    Raises:
        OSError: If it cannot be written.
    """
    unfinished = f"{name}.{secrets.token_hex(8)}.tmp"
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, FILE_MODE, dir_fd=folder)
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, FILE_MODE)  # Whatever the umask is.
            file.write(content)
        os.replace(unfinished, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished, dir_fd=folder)
        raise


def _make(path: Path) -> None:
    """Create a folder for this user alone, whatever the umask is, if there is none."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, FOLDER_MODE)
        os.chmod(path, FOLDER_MODE)


def _check(what: object, status: os.stat_result, sticky: bool = False) -> None:
    """Refuse what somebody else owns or may write to; in a sticky folder, nobody can replace what is another's."""
    shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not (sticky and status.st_mode & stat.S_ISVTX)
    if status.st_uid not in (os.geteuid(), 0) or shared:
        raise PermissionError(f"{what} may have been written by somebody else")
