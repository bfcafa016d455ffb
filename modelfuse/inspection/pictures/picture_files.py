"""Write files atomically, without replacing files that modelfuse has not written."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

from modelfuse.errors import OutputError

#: The mark in every page and image, and the number of bytes at the beginning that contain it.
MARK, BEGINNING = b"modelfuse", 4096
#: The signature of a PNG file, and the bytes up to the end of its first chunk.
PNG, FIRST_CHUNK = b"\x89PNG\r\n\x1a\n", 33


def replace_file(path: Path, content: bytes, overwrite: bool = False) -> None:
    """Write a file atomically.

    Args:
        path: The file.
        content: Its content, with MARK near the beginning.
        overwrite: Whether to replace a file that modelfuse has not written.

    Raises:
        OutputError: If there is such a file, or no folder.
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
    """Check that a file can be written or replaced, before any work is done.

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
    """Add the mark to a PNG image."""
    text = b"tEXt" + b"Software\x00" + MARK
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    return content[:FIRST_CHUNK] + chunk + content[FIRST_CHUNK:] if content.startswith(PNG) else content
