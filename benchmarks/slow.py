"""A disk that reads no faster than it is told to: the kernel's own limit on a control group's reading.

It needs root, and a control group folder that can be written (version 1's blkio or version 2's io controller).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


@contextmanager
def limited(folder: Path, bytes_per_second: int) -> Iterator[list[str]]:
    """Limit how fast programs read from the disk that ``folder`` is on.

    Yields:
        Words to put before a command, so that it runs under the limit.

    Raises:
        OSError: If the limit cannot be set.
    """
    if not bytes_per_second:
        yield []
        return
    device = _device(folder)
    old = ROOT / "blkio"
    group = (old if old.exists() else ROOT) / f"modelfuse-benchmark-{os.getpid()}"
    group.mkdir()
    try:
        if old.exists():
            (group / "blkio.throttle.read_bps_device").write_text(f"{device} {bytes_per_second}")
        else:
            (ROOT / "cgroup.subtree_control").write_text("+io")
            (group / "io.max").write_text(f"{device} rbps={bytes_per_second}")
        yield entering(group)
    finally:
        group.rmdir()


def entering(group: Path) -> list[str]:
    """Words to put before a command, so that it runs in a control group."""
    return ["/bin/sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]


def _device(folder: Path) -> str:
    """The numbers of the whole disk that a folder is on: limits are not set on partitions."""
    number = os.stat(folder).st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    place = Path(f"/sys/dev/block/{name}").resolve()
    return (place.parent / "dev").read_text().strip() if (place / "partition").exists() else name
