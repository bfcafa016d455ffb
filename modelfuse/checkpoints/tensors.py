"""What is known of a stored tensor before its values are read, and of a whole checkpoint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from modelfuse.dtypes import DType
from modelfuse.storage import PathOrUrl
from modelfuse.storage.files import Buffer, OpenFile, SourceFile


class Reader(Protocol):
    """Reads a tensor's elements in row-major order."""

    def __call__(self, start: int, buffer: Buffer) -> None:
        """Fill ``buffer`` with the bytes of the elements from number ``start`` on.

        Elements are little-endian. Safe to call from several threads.

        Raises:
            CheckpointError: If the file is shorter than it was, or the disk fails.
        """


@dataclass(frozen=True, slots=True)
class PlainReader:
    """Reads elements that lie in a file as they are, one after another.

    Attributes:
        file: The file.
        offset: Where the first one lies.
        dtype: Their type.
    """

    file: OpenFile
    offset: int
    dtype: DType

    def __call__(self, start: int, buffer: Buffer) -> None:
        """As a :class:`Reader`."""
        self.file.read(self.offset + self.dtype.nbytes(start), buffer)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: row-major, little-endian, at a known offset.

    Attributes:
        name: Its name in the checkpoint.
        dtype: Its element type.
        shape: Its shape.
        file: The file that holds it.
        offset: Where its first byte lies in the file.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: SourceFile
    offset: int

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.dtype.nbytes(self.size)

    @property
    def natural(self) -> DType:
        """The type that an output stores it in unless told otherwise; a tensor that is computed may read wider."""
        return self.dtype

    @property
    def stored(self) -> DType:
        """The type of the elements in the file; a tensor that is computed may read wider."""
        return self.dtype

    @property
    def is_delta(self) -> bool:
        """Whether its values are differences to the base already, as an adapter's are."""
        return False

    @property
    def reader_bytes(self) -> int:
        """The most memory that reading a slice takes beside the buffer that is filled."""
        return 0

    @property
    def held(self) -> int:
        """Bytes that computing its values keeps resident while its tensor is under way."""
        return 0

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """The tensors that its values are computed from; none if they lie in its file as they are."""
        return ()

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """All files that its values come from."""
        return tuple(dict.fromkeys(file for part in self.made_of for file in part.files)) or (self.file,)

    @property
    def is_made(self) -> bool:
        """Whether its values are no input's, although it is of one input."""
        return False

    @property
    def tolerance(self) -> float | None:
        """How far its values may be apart on another machine, relative to the largest; None: not by one bit."""
        return None

    @property
    def facts(self) -> Mapping[str, object]:
        """What a report should tell of it beside its values, known once it was read."""
        return {}

    def expect(self, start: int, count: int) -> bool:
        """Say that elements will be read soon, so that those in a store are sent for, all at once.

        Returns:
            Whether that is done; False if there is no room for them yet.
        """
        if not self.made_of:
            return self.file.expect(self.offset + self.dtype.nbytes(start), self.dtype.nbytes(count))
        # About what they are made of; what is read all the same and was not expected is fetched then.
        shares = [(part, start * part.size // self.size, -(-count * part.size // self.size)) for part in self.made_of]
        return all(part.expect(first, share) for part, first, share in shares)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading; the file is checked to be the one whose header was read."""
        with self.file.open() as file:
            yield PlainReader(file, self.offset, self.dtype)


@dataclass(frozen=True, slots=True)
class MovedTensor(StoredTensor):
    """A tensor whose elements are those of others, in another order: all else is as it is there."""

    @property
    def natural(self) -> DType:
        """That of what it is made of."""
        return self.made_of[0].natural

    @property
    def stored(self) -> DType:
        """That of what it is made of."""
        return self.made_of[0].stored

    @property
    def is_delta(self) -> bool:
        """That of what it is made of."""
        return self.made_of[0].is_delta

    @property
    def held(self) -> int:
        """What all that it is made of holds."""
        return sum(part.held for part in self.made_of)


class Frame(NamedTuple):
    """How a weight file is laid out before any tensor is in it.

    Attributes:
        pieces: All bytes that are no tensor's, as runs: where each begins, and its bytes.
        offsets: Where each tensor begins.
        size: The size of the file.
    """

    pieces: tuple[tuple[int, bytes], ...]
    offsets: tuple[int, ...]
    size: int

    @property
    def digest(self) -> str:
        """The sha256 of all bytes that are no tensor's, in their order."""
        return hashlib.sha256(b"".join(piece for _, piece in self.pieces)).hexdigest()


@dataclass(frozen=True)
class Checkpoint(Mapping[str, StoredTensor]):
    """The tensors of one model, by name, in the order of their files.

    Attributes:
        path: The folder (or file) that the user named.
        kind: ``safetensors``, ``torch`` or ``paddle``.
        tensors: Every distinct tensor by name.
        aliases: Further names of tensors that share their bytes with one of ``tensors``
            (pickle formats keep tied weights so): alias → name in ``tensors``.
        metadata: The ``__metadata__`` of a safetensors file.
        config: The contents of config.json, empty if there is none.
        left_out: Tensors of the files that are not among these, and why: name → reason.
        dequantized: Whether config.json declares a quantization that is undone here.
        layout: ``hf`` or ``paddle``: how its Linear weights are stored, once that is known.
        stem: What its weight files are called, where that is not as usual.
        renamed: What was called otherwise than in the model whose names the output has, in words.
        config_changes: Settings of config.json in its file that are no longer true of these tensors, and what is.
    """

    path: PathOrUrl
    kind: str
    tensors: Mapping[str, StoredTensor]
    aliases: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    dequantized: bool = False
    layout: Literal["hf", "paddle"] | None = None
    stem: str | None = None
    renamed: tuple[str, ...] = ()
    config_changes: Mapping[str, object] = field(default_factory=dict)

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The files that are its own, each once."""
        return tuple(dict.fromkeys(file for tensor in self.values() for file in tensor.files))

    def __getitem__(self, name: str) -> StoredTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
