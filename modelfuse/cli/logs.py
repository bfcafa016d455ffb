"""Lines with times and levels, for those who read later what happened."""

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
    """What appends lines to a file, opened for each: few come, and none is lost or held back.

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
    return _forgiving(write)


def log_stream(stream: TextIO) -> Log:
    """What writes lines to a stream."""
    return _forgiving(lambda level, text: stream.writelines(_lines(level, text)))


def _lines(level: str, text: str) -> Iterator[str]:
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return (f"{now} {level:7} {line}\n" for line in text.splitlines() if line)


def _forgiving(write: Log) -> Log:
    """The same, but that a full disk ends no merge."""

    def forgiving(level: str, text: str) -> None:
        with suppress(OSError):
            write(level, text)

    return forgiving
