"""Stored tensors and checkpoints: what is known from headers, and how values are read."""

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
        """Fill ``buffer`` with the bytes of the elements from index ``start`` on.

        Elements are little-endian. Thread-safe.

        Raises:
            CheckpointError: If the file was truncated, or the disk fails.
        """


@dataclass(frozen=True, slots=True)
class PlainReader:
    """Reads elements that are stored contiguously and unencoded.

    Attributes:
        file: The file.
        offset: The byte offset of the first element.
        dtype: The element type.
    """

    file: OpenFile
    offset: int
    dtype: DType

    def __call__(self, start: int, buffer: Buffer) -> None:
        """See :class:`Reader`."""
        self.file.read(self.offset + self.dtype.nbytes(start), buffer)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: row-major, little-endian, at a known offset.

    Attributes:
        name: Its name in the checkpoint.
        dtype: Its element type.
        shape: Its shape.
        file: The file that holds it.
        offset: The byte offset of its first element.
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
        """The default output type; a computed tensor may read wider."""
        return self.dtype

    @property
    def stored(self) -> DType:
        """The element type in the file; a computed tensor may read wider."""
        return self.dtype

    @property
    def is_delta(self) -> bool:
        """Whether its values are already differences to the base, as an adapter's are."""
        return False

    @property
    def reader_bytes(self) -> int:
        """Peak memory in bytes of reading a slice, beside the buffer that is filled."""
        return 0

    @property
    def held(self) -> int:
        """Bytes that stay in memory to compute its values, while its tensor is in progress."""
        return 0

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """The tensors that its values are computed from; empty for a tensor that is stored as it is."""
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
        """How much its values may differ on another machine, relative to the largest; None: they are bit-identical."""
        return None

    @property
    def facts(self) -> Mapping[str, object]:
        """Report entries about it, known once it was read."""
        return {}

    def expect(self, start: int, count: int) -> bool:
        """Announce that elements will be read soon, so that remote ones are fetched together.

        Returns:
            False if the range cache is full, so that it must be announced again.
        """
        if not self.made_of:
            return self.file.expect(self.offset + self.dtype.nbytes(start), self.dtype.nbytes(count))
        # Approximately: what is read without having been announced is fetched on read.
        shares = [(part, start * part.size // self.size, -(-count * part.size // self.size)) for part in self.made_of]
        return all(part.expect(first, share) for part, first, share in shares)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading; the file is checked to be the one whose header was read."""
        with self.file.open() as file:
            yield PlainReader(file, self.offset, self.dtype)


@dataclass(frozen=True, slots=True)
class MovedTensor(StoredTensor):
    """A tensor whose elements are those of other tensors, in another order; its properties are theirs."""

    @property
    def natural(self) -> DType:
        """That of its sources."""
        return self.made_of[0].natural

    @property
    def stored(self) -> DType:
        """That of its sources."""
        return self.made_of[0].stored

    @property
    def is_delta(self) -> bool:
        """That of its sources."""
        return self.made_of[0].is_delta

    @property
    def held(self) -> int:
        """The sum of its sources'."""
        return sum(part.held for part in self.made_of)


@dataclass(frozen=True, slots=True)
class PartialTensor(MovedTensor):
    """Some elements of one tensor, which takes as much memory to read.

    Attributes:
        source: The tensor.
    """

    source: StoredTensor

    @property
    def reader_bytes(self) -> int:
        """That of the source."""
        return self.source.reader_bytes

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """The source."""
        return (self.source,)


class Frame(NamedTuple):
    """The layout of a weight file without its tensors' bytes.

    Attributes:
        pieces: All bytes that belong to no tensor, as runs: (offset, bytes).
        offsets: The byte offset of each tensor.
        size: The size of the file.
    """

    pieces: tuple[tuple[int, bytes], ...]
    offsets: tuple[int, ...]
    size: int

    @property
    def digest(self) -> str:
        """The sha256 of all bytes that belong to no tensor, in order."""
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
        left_out: Tensors of the files that are left out: name → reason.
        dequantized: Whether config.json declares a quantization that is undone on read.
        layout: ``hf`` or ``paddle``: how its Linear weights are stored, once that is known.
        stem: The stem of its weight files' names, if it is not the usual one.
        renamed: Descriptions of renamed tensors, which had other names than in the output.
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

    def has(self, name: str) -> bool:
        """Whether there is a tensor with this name or alias."""
        return name in self.tensors or name in self.aliases

    def resolve(self, name: str) -> StoredTensor:
        """The tensor with this name or alias.

        Raises:
            KeyError: If there is none.
        """
        return self.tensors[self.aliases.get(name, name)]

    def find(self, name: str) -> StoredTensor | None:
        """The tensor with this name or alias; None if there is none."""
        return self.tensors.get(self.aliases.get(name, name))

    def __getitem__(self, name: str) -> StoredTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
