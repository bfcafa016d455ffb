"""Sequential reads of a part of a file, with skipping."""

from __future__ import annotations

from modelfuse.checkpoints.formats.pickle_types import Refused
from modelfuse.storage.files import OpenFile

#: The longest text or line that is read into memory; longer ones stay in the file.
MAX_LITERAL = 1024
_CHUNK = 8192


class Window:
    """The bytes from ``start`` to ``end`` of an open file, read in order.

    Memory is bounded by one chunk, whatever lengths the file claims.

    Args:
        file: The file.
        start: The first offset.
        end: The end offset; None: the end of the file.
    """

    def __init__(self, file: OpenFile, start: int = 0, end: int | None = None) -> None:
        self._file = file
        self._end = file.size if end is None else end
        self._chunk = b""
        self._chunk_start = start
        self._at = 0

    @property
    def position(self) -> int:
        """The offset in the file of the next byte."""
        return self._chunk_start + self._at

    def take(self, count: int) -> bytes:
        """Read ``count`` bytes; the caller has checked that they are few.

        Raises:
            Refused: If the window ends before.
        """
        end = self._at + count
        if end > len(self._chunk):
            self._fill(count)
            end = count
        taken = self._chunk[self._at : end]
        self._at = end
        return taken

    def byte(self) -> int:
        """Read one byte.

        Raises:
            Refused: If the window has ended.
        """
        at = self._at
        if at == len(self._chunk):
            self._fill(1)
            at = 0
        self._at = at + 1
        return self._chunk[at]

    def skip(self, count: int) -> int:
        """Skip ``count`` bytes; returns the offset of the first.

        Raises:
            Refused: If the window ends before.
        """
        self.check_left(count)
        start = self.position
        self._at += count
        if self._at > len(self._chunk):
            self._chunk, self._chunk_start, self._at = b"", start + count, 0
        return start

    def line(self) -> str:
        """Read a short line of ASCII, without its newline.

        Raises:
            Refused: If there is none.
        """
        if len(self._chunk) - self._at <= MAX_LITERAL:
            self._fill(min(MAX_LITERAL + 1, self._end - self.position))
        end = self._chunk.find(b"\n", self._at, self._at + MAX_LITERAL + 1)
        if end < 0:
            raise Refused(f"there is no short line at byte {self.position:,} (truncated?)")
        text = self._chunk[self._at : end].decode("ascii", "backslashreplace")
        self._at = end + 1
        return text

    def check_left(self, count: int) -> None:
        """Check that at least ``count`` bytes are left.

        Raises:
            Refused: If not.
        """
        left = self._end - self.position
        if not 0 <= count <= left:
            raise Refused(f"at byte {self.position:,} it claims {count:,} more bytes, but has {left:,} (truncated?)")

    def _fill(self, count: int) -> None:
        start = self.position
        self.check_left(count)
        chunk = bytearray(min(max(count, _CHUNK), self._end - start))
        self._file.read(start, memoryview(chunk))
        self._chunk, self._chunk_start, self._at = bytes(chunk), start, 0
