"""Preallocate files on the disk.

Writes to preallocated blocks need no allocation: on ext4, concurrent writers would wait for each other, and for the
disk, during allocation. And a disk that is too small is noticed before any work is done.
"""

from __future__ import annotations

import ctypes
import errno
import os

from modelfuse.storage.local.system_calls import failure_of, find

#: Errors that do not mean that the filesystem cannot preallocate.
_SERIOUS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def allocate(descriptor: int, size: int) -> None:
    """Set the size of a new file, and preallocate its blocks if the filesystem can.

    Raises:
        OSError: If the disk is too small.
    """
    # Not posix_fallocate: glibc emulates it by writing to each block. musl has only the name without 64.
    take = find("fallocate64", "fallocate")
    start, length = ctypes.c_int64(0), ctypes.c_int64(size)
    failure = errno.ENOSYS if take is None else failure_of(take, descriptor, 0, start, length)
    if failure in _SERIOUS:
        raise OSError(failure, os.strerror(failure))
    if failure:
        os.truncate(descriptor, size)
