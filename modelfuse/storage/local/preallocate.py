"""The place of a file on the disk, taken when the file is made.

What is written to a place that was taken before needs none to be looked for: on ext4, threads that write wait for each
other, and for the disk, as long as that takes. And a disk that is too small says so before there is any work in vain.
"""

from __future__ import annotations

import ctypes
import errno
import os

from modelfuse.storage.local.system_calls import failure_of, find

#: What no filesystem means by "not here".
_SERIOUS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def allocate(descriptor: int, size: int) -> None:
    """Give a new file its size, and its place where the filesystem can; elsewhere it gets that as it is written.

    Raises:
        OSError: If there is no room for it.
    """
    # Not posix_fallocate: glibc writes to every block where a filesystem cannot. musl has only the short name.
    take = find("fallocate64", "fallocate")
    start, length = ctypes.c_int64(0), ctypes.c_int64(size)
    failure = errno.ENOSYS if take is None else failure_of(take, descriptor, 0, start, length)
    if failure in _SERIOUS:
        raise OSError(failure, os.strerror(failure))
    if failure:
        os.truncate(descriptor, size)
