"""Manage the page cache for streamed files: read ahead of the workers, and drop pages after they were read.

Pages that were already cached stay. Where the system cannot tell what is cached, nothing is dropped; where it takes no
advice (posix_fadvise), nothing is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from modelfuse.storage import PathOrUrl, Url
from modelfuse.storage.files import SourceFile
from modelfuse.storage.local.journal import sync_data

#: The unit of reading ahead and dropping; the system's folios are not larger, and aligned.
CHUNK = 2 << 20
#: The system's read-ahead in bytes, if it is unknown.
READ_AHEAD = 128 << 10
#: The number of Linux's system call cachestat (since 6.5) on all architectures.
CACHESTAT = 451
#: States of a chunk: absent; cached by someone else, or unknown; cached by us; dropped again.
ABSENT, THEIRS, OURS, GONE = range(4)
#: A chunk that is partly cached: the rest is read ahead, and nothing is dropped.
MIXED = 4
#: A file counts as cached if this many samples of this many bytes are: checking all of it takes 5 ms per GB. A wrong
#: guess only costs speed, as nothing is read ahead and nothing is dropped.
PROBES, PROBE = 64, 64 << 10
#: The share of memory that must stay free; below it, the system starts to evict the oldest pages.
SPARE = 1 / 16


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Pages(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writing", "evicted", "recently"))


class Advice(NamedTuple):
    """Advice to the system about a file.

    Attributes:
        path: The file.
        runs: Runs of bytes: (offset, count).
        what: The constant of posix_fadvise.
        step: The most bytes per call; read-ahead is cut off beyond that.
    """

    path: PathOrUrl
    runs: list[tuple[int, int]]
    what: int
    step: int = sys.maxsize

    def give(self) -> None:
        """Give the advice; errors are ignored, as readers of the file will get them."""
        with contextlib.suppress(OSError):
            descriptor = os.open(str(self.path), os.O_RDONLY | os.O_CLOEXEC)
            try:
                for begin, count in self.runs:
                    for offset in range(begin, begin + count, self.step):
                        os.posix_fadvise(descriptor, offset, min(self.step, begin + count - offset), self.what)
            finally:
                os.close(descriptor)


class PageCache:
    """Tracks which chunks of files are cached, and which of them by us. Not thread-safe.

    Methods return the advice instead of giving it, so that it can be given outside the caller's lock.
    """

    def __init__(self) -> None:
        self._files: dict[SourceFile, _Chunks] = {}
        self._advises = hasattr(os, "posix_fadvise")

    def expect(self, file: SourceFile, offset: int, count: int) -> Iterator[Advice]:
        """Bytes that will be read once: advice to read the missing chunks ahead."""
        chunks = self._chunks(file)
        if chunks is not None and (runs := chunks.bring(offset, count)) and chunks.read_ahead < CHUNK:
            yield Advice(file.path, runs, os.POSIX_FADV_WILLNEED, chunks.read_ahead)

    def passed(self, file: SourceFile, offset: int, count: int) -> Iterator[Advice]:
        """Bytes that were read: advice to drop chunks of ours that were read completely."""
        chunks = self._files.get(file)
        if chunks is not None and (runs := chunks.release(offset, count)):
            yield Advice(file.path, runs, os.POSIX_FADV_DONTNEED)

    def leave(self) -> Iterator[Advice]:
        """The end of reading: advice to drop all chunks of ours."""
        for file, chunks in self._files.items():
            if runs := chunks.release_all():
                yield Advice(file.path, runs, os.POSIX_FADV_DONTNEED)
        self._files.clear()

    def _chunks(self, file: SourceFile) -> _Chunks | None:
        if isinstance(file.path, Url):  # Remote files are not in the page cache.
            return None
        if self._advises and file not in self._files:
            self._files[file] = _Chunks(file)
        return self._files.get(file)


class _Chunks:
    """The chunks of a file: their states, and how many bytes of each are still to be read."""

    def __init__(self, file: SourceFile) -> None:
        self._size = file.size
        self._states, self.read_ahead = _look(file)
        #: Bytes still to be read, for chunks of ours that were read partly.
        self._left: dict[int, int] = {}

    def bring(self, offset: int, count: int) -> list[tuple[int, int]]:
        """The runs of absent chunks in a range, which become ours."""
        numbers = self._numbers(offset, count)
        return [*self._turn(numbers, ABSENT, OURS), *self._turn(numbers, MIXED, THEIRS)]

    def release(self, offset: int, count: int) -> list[tuple[int, int]]:
        """The runs of chunks that were read completely, which become dropped."""
        numbers, done = self._numbers(offset, count), list[tuple[int, int]]()
        for number in numbers if self._states.find(OURS, numbers.start, numbers.stop) >= 0 else ():
            if self._states[number] == OURS:
                begin, end = self._bounds(number)
                read = min(end, offset + count) - max(begin, offset)
                self._left[number] = left = self._left.get(number, end - begin) - read
                if left <= 0:
                    self._left.pop(number)
                    done += self._turn(range(number, number + 1), OURS, GONE)
        return done

    def release_all(self) -> list[tuple[int, int]]:
        """The runs of all chunks that were ever ours: parts of dropped ones may still, or again, be cached."""
        numbers = range(len(self._states))
        return [*self._turn(numbers, OURS, THEIRS), *self._turn(numbers, GONE, THEIRS)]

    def _numbers(self, offset: int, count: int) -> range:
        return range(min(offset, self._size) // CHUNK, -(-min(offset + count, self._size) // CHUNK))

    def _bounds(self, number: int) -> tuple[int, int]:
        return number * CHUNK, min((number + 1) * CHUNK, self._size)

    def _turn(self, numbers: range, state: int, becomes: int) -> Iterator[tuple[int, int]]:
        """Change chunks from one state to another; yields their runs of bytes."""
        begin = numbers.start
        while (begin := self._states.find(state, begin, numbers.stop)) >= 0:
            end = begin
            while end < numbers.stop and self._states[end] == state:
                self._states[end] = becomes
                end += 1
            yield begin * CHUNK, (end - begin) * CHUNK
            begin = end


def settle(descriptor: int) -> None:
    """Sync a file and, if memory is scarce, drop it from the cache.

    A server will read the output next, so it may stay in memory that is free, but must not evict anything else.

    Raises:
        OSError: If it cannot be written to the disk.
    """
    sync_data(descriptor)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if os.sysconf("SC_AVPHYS_PAGES") < os.sysconf("SC_PHYS_PAGES") * SPARE:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _look(file: SourceFile) -> tuple[bytearray, int]:
    """The initial state of each chunk of a file, and the read-ahead of its device in bytes."""
    number = -(-file.size // CHUNK)
    states, read_ahead = bytearray([MIXED]) * number, READ_AHEAD  # If unknown: read ahead, drop nothing.
    with contextlib.suppress(OSError):
        descriptor = os.open(str(file.path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            read_ahead = _read_ahead(os.fstat(descriptor).st_dev)

            def state(start: int, count: int) -> int:
                return _state(descriptor, start, min(count, file.size - start))

            probed = range(0, file.size, -(-number // PROBES) * CHUNK or CHUNK)
            if all(state(start, PROBE) == THEIRS for start in probed):
                states[:] = bytes([THEIRS]) * number
            else:
                states[:] = bytes(state(start, CHUNK) for start in range(0, file.size, CHUNK))
        finally:
            os.close(descriptor)
    return states, read_ahead


@cache
def _read_ahead(device: int) -> int:
    """The system's read-ahead in bytes for a device or network filesystem."""
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    try:
        return (int(setting.read_text()) << 10) or READ_AHEAD
    except (OSError, ValueError):
        return READ_AHEAD


def _state(descriptor: int, offset: int, count: int) -> int:
    asked, pages = _Range(offset, count), _Pages()
    if _libc().syscall(ctypes.c_long(CACHESTAT), descriptor, ctypes.byref(asked), ctypes.byref(pages), 0):
        raise OSError(ctypes.get_errno(), "cachestat")
    if not pages.cached:
        return ABSENT
    return THEIRS if pages.cached * os.sysconf("SC_PAGE_SIZE") >= count else MIXED


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
