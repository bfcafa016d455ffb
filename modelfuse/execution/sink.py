"""Interfaces of what receives the output files of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from modelfuse.checkpoints.tensors import Frame


class Sink(Protocol):
    """Receives the weight files: a folder to write, or one to compare with."""

    def create(self, name: str, frame: Frame) -> None:
        """Create a file, once and before anything is written to it."""

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes of a file at an offset; thread-safe."""

    def keep(self, name: str, nbytes: int, entry: object) -> None:
        """Record a finished span: its file, its bytes and its journal entry; thread-safe."""

    def share(self) -> Path | None:
        """The folder, for other machines to write the files directly; None if they can only be written by ``write``."""

    def ahead(self) -> int | None:
        """Bytes buffered until those before them in their file are written; None if files take writes in any order."""


class OutputSink(Sink, Protocol):
    """Receives all files of an output.

    Attributes:
        digests: sha256 by file name: of every small file, and of each weight file without its tensors' bytes.
    """

    digests: dict[str, str]

    def finished(self) -> Iterator[object]:
        """The journal entries that earlier runs passed to ``keep``."""

    def write_file(self, name: str, content: bytes | Iterable[bytes]) -> None:
        """Write a small file, given whole or in parts."""

    def commit(self) -> None:
        """Complete the output: all files were written."""
