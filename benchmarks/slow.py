"""Disks that read no faster than they are told to, and servers that answer late. Both need root, and Linux.

The one is the kernel's own limit on a control group's reading (version 1's blkio or version 2's io controller);
the other a file system of our own, see ``distant.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from programs import HERE

ROOT = Path("/sys/fs/cgroup")


@contextmanager
def limited(folder: Path, bytes_per_second: int) -> Iterator[list[str]]:
    """Limit how fast programs read from the disk that ``folder`` is on.

    Yields:
        Words to put before a command, so that it runs under the limit.

    Raises:
        OSError: If the limit cannot be set.
    """
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


@contextmanager
def distant(folder: Path, point: Path, milliseconds: float, bytes_per_second: float) -> Iterator[None]:
    """Show a folder's files at another place, where reading them takes time.

    Raises:
        OSError: If that cannot be done.
    """
    point.mkdir(exist_ok=True)
    words = [folder, point, milliseconds, bytes_per_second / 1e6]
    server = subprocess.Popen([sys.executable, str(HERE / "distant.py"), *map(str, words)])
    try:
        while not os.path.ismount(point):
            if server.poll() is not None:
                raise OSError(f"{point} cannot be mounted")
            time.sleep(0.05)
        yield
    finally:
        subprocess.run(["umount", str(point)], check=False)
        server.terminate()
        server.wait()
        point.rmdir()


def entering(group: Path) -> list[str]:
    """Words to put before a command, so that it runs in a control group."""
    return ["/bin/sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]


def _device(folder: Path) -> str:
    """The numbers of the whole disk that a folder is on: limits are not set on partitions."""
    number = os.stat(folder).st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    place = Path(f"/sys/dev/block/{name}").resolve()
    return (place.parent / "dev").read_text().strip() if (place / "partition").exists() else name
