"""The place of a file on the disk, taken when the file is made.

What is written to a place that was taken before needs none to be looked for: on ext4, threads that write wait for each
other, and for the disk, as long as that takes. And a disk that is too small says so before there is any work in vain.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from functools import cache

#: What no filesystem means by "not here".
_SERIOUS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def allocate(descriptor: int, size: int) -> None:
    """Give a new file its size, and its place where the filesystem can; elsewhere it gets that as it is written.

    Raises:
        OSError: If there is no room for it.
    """
    take = _fallocate()
    failure = errno.ENOSYS if take is None else errno.EINTR
    # Not posix_fallocate: glibc writes to every block where a filesystem cannot.
    while take is not None and failure == errno.EINTR:
        failure = ctypes.get_errno() if take(descriptor, 0, 0, size) else 0
    if failure in _SERIOUS:
        raise OSError(failure, os.strerror(failure))
    if failure:
        os.truncate(descriptor, size)


@cache
def _fallocate() -> Callable[[int, int, int, int], int] | None:
    """Linux has the call; glibc has it for large files by another name than musl."""
    libc = ctypes.CDLL(None, use_errno=True)
    take = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if take is not None:
        take.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return take
