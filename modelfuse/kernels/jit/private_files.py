"""Files that no other user can have written, since code is loaded from them.

A folder or file is trusted if it belongs to the effective user or root and nobody else may write to it, and if the same
holds for all parent folders: whoever may write to one of them could replace the folder in it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER_MODE, FILE_MODE = 0o700, 0o600
#: Links are not followed, and opening a pipe does not block.
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextmanager
def private_folder(path: Path, make: bool = False) -> Iterator[int]:
    """Open a trusted folder.

    Args:
        path: The folder.
        make: Whether to create missing folders, accessible to this user only.

    Returns:
        A context with the folder's descriptor.

    Raises:
        OSError: If it does not exist, cannot be created, or is not trusted.
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
    """Read a trusted file in a folder.

    Raises:
        OSError: If it cannot be read, or is not trusted.
    """
    descriptor = os.open(name, os.O_RDONLY | _FLAGS, dir_fd=folder)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PermissionError(f"{name} is not a regular file")
        _check(name, status)
        return file.read()


def write_private(folder: int, name: str, content: bytes) -> None:
    """Write a file in a folder atomically, accessible to this user only.

    Raises:
        OSError: If it cannot be written.
    """
    unfinished = f"{name}.{os.urandom(8).hex()}.tmp"
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
    """Create a folder that is accessible to this user only, whatever the umask is, unless it exists."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, FOLDER_MODE)
        os.chmod(path, FOLDER_MODE)


def _check(what: object, status: os.stat_result, sticky: bool = False) -> None:
    """Refuse what another user owns or may write to; a sticky folder is safe, as others cannot replace files in it."""
    shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not (sticky and status.st_mode & stat.S_ISVTX)
    if status.st_uid not in (os.geteuid(), 0) or shared:
        raise PermissionError(f"{what} may have been written by another user")
