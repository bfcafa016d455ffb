"""Memory made ready before a run, so that a run costs the same whatever came before it."""

from __future__ import annotations

import tempfile
from pathlib import Path

BLOCK = bytes(8 << 20)


def level_memory(size: int, folder: Path) -> None:
    """Write and remove a file twice in a folder, so that memory for as much output has just been in use.

    A virtual machine gives memory that has been free for some seconds back to its host, and taking it again costs as
    much as merging: whoever came after a long run or a pause would pay. Writing as much once is not always enough.

    Args:
        size: Bytes of the output that comes.
        folder: On the disk that it comes to.

    Raises:
        OSError: The disk is full.
    """
    for _ in range(2):
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            for _ in range(0, size, len(BLOCK)):
                file.write(BLOCK)
