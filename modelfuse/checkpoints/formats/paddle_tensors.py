"""The ways in which old Paddle files keep a tensor other than as one run of its bytes."""

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
    """A tensor of a few bytes that came with the header.

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
    """Where in a text known bytes of its tensor are: found while reading, kept for the next reading.

    Pieces of text are always cut at the same places, so every reading finds the same landmarks.
    """

    __slots__ = ("_decoded", "_encoded", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._decoded = [0]
        self._encoded = [0]

    def __reduce__(self) -> tuple[type[Landmarks], tuple[()]]:
        # Another process finds its own.
        return Landmarks, ()

    def before(self, position: int) -> tuple[int, int]:
        """The last landmark at or before a byte of the tensor: byte of the tensor, byte of the text."""
        with self._lock:
            at = bisect_right(self._decoded, position) - 1
            return self._decoded[at], self._encoded[at]

    def add(self, decoded: int, encoded: int) -> None:
        """Note a landmark, unless it or a later one is known."""
        with self._lock:
            if decoded > self._decoded[-1]:
                self._decoded.append(decoded)
                self._encoded.append(encoded)


@dataclass(frozen=True, slots=True)
class TextTensor(StoredTensor):
    """A tensor that pickle protocol 2 keeps as text: byte n is the character with code n, in UTF-8.

    A byte has no fixed place in such a text. Reading forward costs one pass of decoding; reading
    far ahead for the first time costs decoding everything before.

    Attributes:
        length: The number of bytes of text, from ``offset`` on.
        landmarks: What is known of the text so far.
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
        # A piece of the last slice runs to the end of the text, so what is too long shows too.
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
    """A tensor cut into slices, because protocols 2 and 3 cannot hold more than 4 GiB at once.

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
