"""Warm up memory before a run, so that its time does not depend on earlier runs."""

from __future__ import annotations

import tempfile
from pathlib import Path

BLOCK = bytes(8 << 20)


def level_memory(size: int, folder: Path) -> None:
    """Write and remove a file twice, so that the page cache has memory for the output that was just in use.

    A virtual machine returns memory that has been free for some seconds to its host, and getting it back takes as long
    as a merge. Writing once is not always enough.

    Args:
        size: Bytes of the run's output.
        folder: A folder on the disk of the output.

    Raises:
        OSError: If the disk is full.
    """
    for _ in range(2):
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            for _ in range(0, size, len(BLOCK)):
                file.write(BLOCK)
