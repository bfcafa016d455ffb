"""Simulate a disk with a limited read rate, and a server with latency. Both need Linux and root.

The limit is that of a control group (blkio of version 1 or io of version 2); the server is the file system of
``distant.py``.
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
    """Limit the read rate of the disk of ``folder``.

    Yields:
        Words that precede a command to run it with the limit.

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
    """Mount a folder's files with latency and a limited bandwidth.

    Raises:
        OSError: If mounting fails.
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
    """Words that precede a command to run it in a control group."""
    return ["/bin/sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]


def _device(folder: Path) -> str:
    """The device numbers of the disk of a folder; limits apply to disks, not to partitions."""
    number = os.stat(folder).st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    device = Path(f"/sys/dev/block/{name}").resolve()
    return (device.parent / "dev").read_text().strip() if (device / "partition").exists() else name
