"""Logs: lines with times and levels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from modelfuse.errors import OutputError

#: Takes a level and text.
Log = Callable[[str, str], None]


def log_file(path: Path) -> Log:
    """A log that appends lines to a file. The file is opened for each line, so that none is buffered.

    Raises:
        OutputError: If it cannot be opened.
    """

    def write(level: str, text: str) -> None:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(_lines(level, text))

    try:
        write("", "")
    except OSError as error:
        raise OutputError(
            f"log_file {path} cannot be written: {error.strerror}", "Name a file in a folder that exists."
        ) from error
    return _ignoring_errors(write)


def log_stream(stream: TextIO) -> Log:
    """A log that writes lines to a stream."""
    return _ignoring_errors(lambda level, text: stream.writelines(_lines(level, text)))


def _lines(level: str, text: str) -> Iterator[str]:
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return (f"{now} {level:7} {line}\n" for line in text.splitlines() if line)


def _ignoring_errors(write: Log) -> Log:
    """The log without errors of writing: a full disk must not end a merge."""

    def log(level: str, text: str) -> None:
        with suppress(OSError):
            write(level, text)

    return log
