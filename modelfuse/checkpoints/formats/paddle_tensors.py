"""Tensors of old Paddle files that are not stored as one run of bytes."""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from modelfuse.checkpoints.tensors import Reader, StoredTensor
from modelfuse.errors import CheckpointError
from modelfuse.storage.files import Buffer, OpenFile

_PIECE = 256 << 10
_TWO_BYTE_LEADS = (0xC2, 0xC3)


@dataclass(frozen=True, slots=True)
class SmallTensor(StoredTensor):
    """A tensor of a few bytes that were read with the header.

    Attributes:
        content: Its bytes.
    """

    content: bytes

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading; the file is checked to be the one whose header was read."""
        with self.file.open():

            def read(start: int, buffer: Buffer) -> None:
                begin = self.dtype.nbytes(start)
                buffer[:] = self.content[begin : begin + len(buffer)]

            yield read


class Landmarks:
    """Known positions of a tensor's bytes in its encoded text, collected while reading.

    The text is always read in the same pieces, so each read finds the same landmarks.
    """

    __slots__ = ("_decoded", "_encoded", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._decoded = [0]
        self._encoded = [0]

    def __reduce__(self) -> tuple[type[Landmarks], tuple[()]]:
        # Not sent to other processes, which find their own.
        return Landmarks, ()

    def before(self, position: int) -> tuple[int, int]:
        """The last landmark at or before a byte of the tensor: (byte of the tensor, byte of the text)."""
        with self._lock:
            at = bisect_right(self._decoded, position) - 1
            return self._decoded[at], self._encoded[at]

    def add(self, decoded: int, encoded: int) -> None:
        """Add a landmark, unless it or a later one is known."""
        with self._lock:
            if decoded > self._decoded[-1]:
                self._decoded.append(decoded)
                self._encoded.append(encoded)


@dataclass(frozen=True, slots=True)
class TextTensor(StoredTensor):
    """A tensor that pickle protocol 2 stores as text: byte n is the character with code n, in UTF-8.

    Bytes have no fixed offset in such a text. Sequential reads decode it once; reading far ahead for the first time
    decodes everything before.

    Attributes:
        length: The number of bytes of text, from ``offset`` on.
        landmarks: Known positions in the text.
    """

    length: int
    landmarks: Landmarks = field(default_factory=Landmarks, compare=False, repr=False)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading; the file is checked to be the one whose header was read."""
        with self.file.open() as file:

            def read(start: int, buffer: Buffer) -> None:
                self._decode_into(file, self.dtype.nbytes(start), buffer)

            yield read

    def _decode_into(self, file: OpenFile, begin: int, buffer: Buffer) -> None:
        decoded, encoded = self.landmarks.before(begin)
        end = begin + len(buffer)
        while decoded < end:
            piece = bytearray(min(_PIECE, self.length - encoded))
            file.read(self.offset + encoded, memoryview(piece))
            if piece and piece[-1] in _TWO_BYTE_LEADS:
                piece.pop()
            content = self._decode(piece)
            first, last = max(begin - decoded, 0), min(end - decoded, len(content))
            if first < last:
                buffer[decoded + first - begin : decoded + last - begin] = content[first:last]
            decoded += len(content)
            encoded += len(piece)
            self.landmarks.add(decoded, encoded)
        # The last piece extends to the end of the text, so that excess bytes are noticed too.
        if decoded > self.nbytes or (decoded == self.nbytes) != (encoded == self.length):
            raise self._malformed()

    def _decode(self, piece: bytearray) -> bytes:
        try:
            content = piece.decode().encode("latin-1")
        except UnicodeError:
            raise self._malformed() from None
        if not content:
            raise self._malformed()
        return content

    def _malformed(self) -> CheckpointError:
        return CheckpointError(
            f"{self.file.path}: the text of tensor {self.name!r} does not decode to {self.nbytes:,} bytes",
            "Fetch or save it again.",
        )


@dataclass(frozen=True, slots=True)
class JoinedTensor(StoredTensor):
    """A tensor that is split into slices, as protocols 2 and 3 are limited to 4 GiB per object.

    Attributes:
        parts: Its slices in row-major order.
    """

    parts: tuple[StoredTensor, ...]

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open all parts for reading."""
        starts = [0, *itertools.accumulate(part.size for part in self.parts)]
        with ExitStack() as stack:
            readers = [stack.enter_context(part.open()) for part in self.parts]

            def read(start: int, buffer: Buffer) -> None:
                while len(buffer):
                    number = bisect_right(starts, start) - 1
                    count = min(len(buffer), self.dtype.nbytes(starts[number + 1] - start))
                    readers[number](start - starts[number], buffer[:count])
                    start = starts[number + 1]
                    buffer = buffer[count:]

            yield read
