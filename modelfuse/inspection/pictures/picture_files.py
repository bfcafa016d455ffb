"""Files that pictures are written to: whole or not at all, and never in the place of somebody else's."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

from modelfuse.errors import OutputError

#: What is in the beginning of every picture that modelfuse writes.
MARK, BEGINNING = b"modelfuse", 4096
#: The signature of a PNG file and its first chunk, which has a fixed size.
PNG, FIRST_CHUNK = b"\x89PNG\r\n\x1a\n", 33


def replace_file(path: Path, content: bytes, overwrite: bool = False) -> None:
    """Write a file, which appears whole.

    Args:
        path: Where.
        content: What; with MARK in its beginning.
        overwrite: Whether to replace a file that modelfuse has not written.

    Raises:
        OutputError: If there is such a file, or no folder for it.
    """
    check_replaceable(path, overwrite)
    unfinished = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        with unfinished.open("xb") as file:
            file.write(content)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def check_replaceable(path: Path, overwrite: bool = False) -> None:
    """Refuse, before any work, to write where something else is.

    Raises:
        OutputError: If there is a file that modelfuse has not written, or no folder.
    """
    if not path.parent.is_dir():
        raise OutputError(f"There is no folder {path.parent} to write {path.name} into", "Create it, or name another.")
    if path.is_dir():
        raise OutputError(f"{path} is a folder", "Name a file.")
    if path.exists() and not overwrite:
        with path.open("rb") as file:
            begin = file.read(BEGINNING)
        if begin and MARK not in begin:
            raise OutputError(
                f"{path} exists, and modelfuse has not written it", "Name another file, or add --overwrite."
            )


def marked_png(content: bytes) -> bytes:
    """A PNG image that says what made it."""
    text = b"tEXt" + b"Software\x00" + MARK
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    return content[:FIRST_CHUNK] + chunk + content[FIRST_CHUNK:] if content.startswith(PNG) else content
