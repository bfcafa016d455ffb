"""Locate the entries of an uncompressed zip archive, as needed for torch's format."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from modelfuse.checkpoints.formats.pickle_types import Refused
from modelfuse.storage.files import OpenFile

_MAX_DIRECTORY_BYTES = 64 << 20
_MAX_ENTRIES = 500_000
_MAX_COMMENT = 0xFFFF
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_UNKNOWN = 0xFFFFFFFF


#: Flags of an entry: encrypted; streamed, so that its local header may lack checksum and sizes.
_ENCRYPTED, _STREAMED = 0x1, 0x8


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry of the central directory."""

    name: bytes
    size: int
    checksum: int
    header: int
    flags: int
    method: int

    @property
    def numbers(self) -> list[int]:
        """The numbers of its local header: checksum, packed size and size."""
        return [self.checksum, self.size, self.size]


class ZipIndex:
    """The central directory of a zip archive.

    Args:
        file: The archive.

    Raises:
        Refused: If it has no valid directory.
    """

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        start, size = self._find_directory()
        self._entries = _parse_directory(self._read(start, size))
        for entry in self._entries.values():  # Each has a local header, which may be far away.
            file.expect(entry.header, min(_LOCAL.size + len(entry.name), max(file.size - entry.header, 0)))

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def locate(self, name: str) -> tuple[int, int]:
        """The extent of an entry's bytes in the file: offset and count.

        Raises:
            Refused: If there is no such entry, or it is compressed, encrypted or truncated.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise Refused(f"the archive has no entry {name!r}")
        if entry.method or entry.flags & _ENCRYPTED:
            raise Refused(
                f"its entry {name!r} is {'encrypted' if entry.flags & _ENCRYPTED else 'compressed'}",
                "torch stores tensors as they are; load the file with torch and save it again.",
            )
        start = self._start(name, entry)
        if start + entry.size > self._file.size:
            raise Refused(f"its entry {name!r} reaches beyond the end of the file (truncated?)")
        return start, entry.size

    def _start(self, name: str, entry: _Entry) -> int:
        """The offset of an entry's bytes, by its local header.

        Other readers use only the local header: if it contradicted the directory, they would read different content.
        """
        header = self._read(entry.header, _LOCAL.size + len(entry.name))
        local = _LOCAL.unpack_from(header)
        if local[0] != b"PK\3\4":
            raise Refused(f"its entry {name!r} is not where the directory says")
        after_name = entry.header + _LOCAL.size + local[9]
        sizes = [local[8], local[7]]
        if _UNKNOWN in sizes:
            sizes = _full_sizes(sizes, self._read(after_name, local[10]))
        found = [local[6], *sizes]
        if local[2] & _STREAMED:  # Zero if it was unknown when the header was written.
            found = [own or told for own, told in zip(found, entry.numbers, strict=True)]
        own_name = header[_LOCAL.size : _LOCAL.size + local[9]]
        if (own_name, local[2] & _ENCRYPTED, local[3], found) != (entry.name, 0, entry.method, entry.numbers):
            raise Refused(
                f"its entry {name!r} is something else by its own header than by the directory",
                "Do not trust this checkpoint: programs would disagree on what it holds.",
            )
        return int(after_name + local[10])

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a small entry.

        Raises:
            Refused: As ``locate``, or if it has more than ``limit`` bytes.
        """
        start, size = self.locate(name)
        if size > limit:
            raise Refused(f"its entry {name!r} has {size:,} bytes")
        return self._read(start, size)

    def _find_directory(self) -> tuple[int, int]:
        tail_start = max(0, self._file.size - _END.size - _MAX_COMMENT)
        tail = self._read(tail_start, self._file.size - tail_start)
        at = tail.rfind(b"PK\5\6")
        if at < 0 or at + _END.size > len(tail):
            raise Refused("it is a zip archive without its directory at the end (truncated download?)")
        end = _END.unpack_from(tail, at)
        size, start = end[5], end[6]
        locator_at = tail_start + at - _LOCATOR64.size
        if locator_at >= 0:
            locator = _LOCATOR64.unpack(self._read(locator_at, _LOCATOR64.size))
            if locator[0] == b"PK\6\7":
                end64 = _END64.unpack(self._read(locator[2], _END64.size))
                size, start = end64[8], end64[9]
        if size > _MAX_DIRECTORY_BYTES:
            raise Refused(f"its zip directory claims {size:,} bytes")
        return start, size

    def _read(self, start: int, size: int) -> bytes:
        if start + size > self._file.size:
            raise Refused("its zip directory points beyond the end of the file (truncated?)")
        content = bytearray(size)
        self._file.read(start, memoryview(content))
        return bytes(content)


def _parse_directory(directory: bytes) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    at = 0
    while at < len(directory):
        if at + _CENTRAL.size > len(directory):
            raise Refused("its zip directory is cut short")
        field = _CENTRAL.unpack_from(directory, at)
        name_at = at + _CENTRAL.size
        extra_at = name_at + field[10]
        at = extra_at + field[11] + field[12]
        if field[0] != b"PK\1\2" or at > len(directory):
            raise Refused("its zip directory is damaged")
        name = directory[name_at:extra_at].decode("utf-8", "backslashreplace")
        if name in entries or len(entries) >= _MAX_ENTRIES:
            raise Refused(f"its zip directory names {name[:200]!r} twice, or too many entries")
        extra = directory[extra_at : extra_at + field[11]]
        size, packed, header = _full_sizes([field[9], field[8], field[16]], extra)
        if not field[4] and size != packed:
            raise Refused(f"its entry {name[:200]!r} has two sizes")
        entries[name] = _Entry(directory[name_at:extra_at], size, field[7], header, field[3], field[4])
    return entries


def _full_sizes(sizes: list[int], extra: bytes) -> list[int]:
    """Size, packed size and header offset; those over 4 GiB stand in a zip64 extra field, in this order."""
    at = 0
    while at + 4 <= len(extra) and _UNKNOWN in sizes:
        tag, length = struct.unpack_from("<2H", extra, at)
        block = extra[at + 4 : at + 4 + length]
        if tag == 1:
            for number, size in enumerate(sizes):
                if size == _UNKNOWN and len(block) >= 8:
                    sizes[number] = int.from_bytes(block[:8], "little")
                    block = block[8:]
            break
        at += 4 + length
    return sizes
