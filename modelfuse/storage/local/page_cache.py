"""The system's page cache: files that are streamed through it come in ahead of their readers, and leave after them.

What somebody else has brought in stays. Where the system does not tell what is in the cache, nothing is made to
leave; where it takes no advice, nothing is done at all.
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

#: What a file comes and leaves by; the system's own pieces are not larger and never straddle two.
CHUNK = 2 << 20
#: How far ahead the system reads, where it does not tell.
READ_AHEAD = 128 << 10
#: The number of the system call on all processors; Linux has it since 6.5.
CACHESTAT = 451
#: What a chunk is: absent; in the cache, because someone else wants it there or because it is not known who;
#: brought in for a reader; gone again.
ABSENT, THEIRS, OURS, GONE = range(4)
#: Parts of a file are partly in the cache: what is missing is to come, and nothing is to leave.
MIXED = 4
#: A file is taken to be in the cache where so many places of it are, of so many bytes each: all of it takes 5 ms a GB.
#: Taking it for whole where it is not costs speed alone, as none of it is brought in, and none of it leaves.
PROBES, PROBE = 64, 64 << 10
#: A share of the memory that is not filled: below it, the system begins to throw out what was used longest ago.
SPARE = 1 / 16


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Pages(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writing", "evicted", "recently"))


class Advice(NamedTuple):
    """What the system is to be told.

    Attributes:
        path: Of which file.
        runs: Of which bytes: offset and count.
        what: One of posix_fadvise's.
        step: How many bytes it may be told of at a time; what comes in is cut off after so many.
    """

    path: PathOrUrl
    runs: list[tuple[int, int]]
    what: int
    step: int = sys.maxsize

    def give(self) -> None:
        """Tell it; what is wrong with the file its readers find out."""
        with contextlib.suppress(OSError):
            descriptor = os.open(str(self.path), os.O_RDONLY | os.O_CLOEXEC)
            try:
                for begin, count in self.runs:
                    for offset in range(begin, begin + count, self.step):
                        os.posix_fadvise(descriptor, offset, min(self.step, begin + count - offset), self.what)
            finally:
                os.close(descriptor)


class PageCache:
    """What the page cache has of some files, and what of it is there for us. Not safe from several threads.

    What is to be done about it is returned, so that nobody has to wait for anybody while it is done.
    """

    def __init__(self) -> None:
        self._files: dict[SourceFile, _Chunks] = {}
        self._advises = hasattr(os, "posix_fadvise")

    def expect(self, file: SourceFile, offset: int, count: int) -> Iterator[Advice]:
        """Bytes of a file are going to be read, each once: bring in what is not there."""
        chunks = self._chunks(file)
        if chunks is not None and (runs := chunks.bring(offset, count)) and chunks.read_ahead < CHUNK:
            yield Advice(file.path, runs, os.POSIX_FADV_WILLNEED, chunks.read_ahead)

    def passed(self, file: SourceFile, offset: int, count: int) -> Iterator[Advice]:
        """Bytes of a file were read: what came in for that may go, as soon as all of its chunk was."""
        chunks = self._files.get(file)
        if chunks is not None and (runs := chunks.release(offset, count)):
            yield Advice(file.path, runs, os.POSIX_FADV_DONTNEED)

    def leave(self) -> Iterator[Advice]:
        """Nothing is going to be read any more: all that came in may go."""
        for file, chunks in self._files.items():
            if runs := chunks.release_all():
                yield Advice(file.path, runs, os.POSIX_FADV_DONTNEED)
        self._files.clear()

    def _chunks(self, file: SourceFile) -> _Chunks | None:
        if isinstance(file.path, Url):  # What is in a store is no file of this system.
            return None
        if self._advises and file not in self._files:
            self._files[file] = _Chunks(file)
        return self._files.get(file)


class _Chunks:
    """A file in chunks: what each is, and how many of its bytes are still to be read."""

    def __init__(self, file: SourceFile) -> None:
        self._size = file.size
        self._states, self.read_ahead = _look(file)
        #: Of those that came in, once something of them was read.
        self._left: dict[int, int] = {}

    def bring(self, offset: int, count: int) -> list[tuple[int, int]]:
        """The runs of absent chunks among these bytes; they are ours from now on."""
        numbers = self._numbers(offset, count)
        return [*self._turn(numbers, ABSENT, OURS), *self._turn(numbers, MIXED, THEIRS)]

    def release(self, offset: int, count: int) -> list[tuple[int, int]]:
        """The runs of chunks that nothing is left of to be read; they are gone from now on."""
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
        """The runs of all chunks that came in; those that were to go too, as some of it may be there still or again."""
        numbers = range(len(self._states))
        return [*self._turn(numbers, OURS, THEIRS), *self._turn(numbers, GONE, THEIRS)]

    def _numbers(self, offset: int, count: int) -> range:
        return range(min(offset, self._size) // CHUNK, -(-min(offset + count, self._size) // CHUNK))

    def _bounds(self, number: int) -> tuple[int, int]:
        return number * CHUNK, min((number + 1) * CHUNK, self._size)

    def _turn(self, numbers: range, state: int, becomes: int) -> Iterator[tuple[int, int]]:
        """The runs of bytes of chunks in a state, which are in another one from now on."""
        begin = numbers.start
        while (begin := self._states.find(state, begin, numbers.stop)) >= 0:
            end = begin
            while end < numbers.stop and self._states[end] == state:
                self._states[end] = becomes
                end += 1
            yield begin * CHUNK, (end - begin) * CHUNK
            begin = end


def settle(descriptor: int) -> None:
    """Make what was written to a file last; where memory is scarce, let it leave the cache.

    A server reads an output next, so it may take memory that nobody uses, but not the place of something else.

    Raises:
        OSError: If it cannot be written to the disk.
    """
    sync_data(descriptor)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if os.sysconf("SC_AVPHYS_PAGES") < os.sysconf("SC_PHYS_PAGES") * SPARE:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _look(file: SourceFile) -> tuple[bytearray, int]:
    """What every chunk of a file is, before anything of it was read; and how many bytes the system reads ahead."""
    number = -(-file.size // CHUNK)
    states, read_ahead = bytearray([MIXED]) * number, READ_AHEAD  # What may not be asked: it comes in, and stays.
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
    """How many bytes the system reads ahead by itself from a device, or from a server."""
    place = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    try:
        return (int(place.read_text()) << 10) or READ_AHEAD
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
