"""What a run gives the weight files to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from modelfuse.checkpoints.tensors import Frame


class Sink(Protocol):
    """Where the weight files go: a folder to write, or one to compare with."""

    def create(self, name: str, frame: Frame) -> None:
        """Begin a file; once for each, before anything is written to it."""

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Take bytes of a file; safe from any thread."""

    def keep(self, name: str, nbytes: int, entry: object) -> None:
        """Take note that so many bytes of a file are finished; safe from any thread."""

    def share(self) -> Path | None:
        """The folder of the files, which other machines may now write to; None if only ``write`` reaches them."""

    def ahead(self) -> int | None:
        """Bytes that it holds until it has what comes before them in their file; None if they may come in any order."""


class OutputSink(Sink, Protocol):
    """Where a whole output goes.

    Attributes:
        digests: The sha256 of every small file, and of all but the tensors of every weight file, by name.
    """

    digests: dict[str, str]

    def finished(self) -> Iterator[object]:
        """The entries, once given to ``keep``, of what is there already."""

    def write_file(self, name: str, content: bytes | Iterable[bytes]) -> None:
        """Take a small file, whole or by its parts."""

    def commit(self) -> None:
        """Everything was given."""
