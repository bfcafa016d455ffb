"""Query and change which bytes of a file are in the page cache.

It uses ``mincore``, independently of modelfuse, which uses ``cachestat``.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)


def resident(path: Path) -> int:
    """The number of bytes of a file in the page cache, in whole pages."""
    size = path.stat().st_size
    if not size:
        return 0
    pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)  # Only its address is used.
        address = ctypes.c_void_p(view.ctypes.data)
        failed = _libc.mincore(address, ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data))
        del view
    if failed:
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return int(np.count_nonzero(pages & 1)) * mmap.PAGESIZE


def share(paths: Iterable[Path]) -> float:
    """The share of the bytes of some files that are in the page cache."""
    files = list(paths)
    return (
        sum(map(resident, files))
        / max(sum(-(-path.stat().st_size // mmap.PAGESIZE) for path in files), 1)
        / mmap.PAGESIZE
    )


def evict(paths: Iterable[Path]) -> None:
    """Drop files from the page cache, and check that they are dropped.

    Raises:
        OSError: If a file stays in it, as another program has it mapped or open for writing, or the system cannot.
    """
    if not hasattr(os, "posix_fadvise"):
        raise OSError("files can be taken out of the page cache on Linux only")
    files = list(paths)
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # Pages that are not on the disk yet would stay.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    for path in files:
        if left := resident(path):
            raise OSError(f"{left:,} bytes of {path} stay in the page cache")


def bring_in(paths: Iterable[Path]) -> None:
    """Read files into the page cache."""
    buffer = memoryview(bytearray(8 << 20))
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
