"""Time and peak memory of a command."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

POLL_SECONDS = 0.02
LOOKS_PER_SEARCH = 20


class CommandFailed(Exception):
    """A measured command ended with a status other than 0; the message has the end of its output."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one command.

    Attributes:
        seconds: Wall time of the process.
        peak_bytes: Peak resident memory of the process and its children together.
        cpu_seconds: Processor time of the process and of the children that it waited for.
    """

    seconds: float
    peak_bytes: int
    cpu_seconds: float

    def as_dict(self) -> dict[str, float]:
        """The fields, for JSON."""
        return asdict(self)


def measure(command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> Sample:
    """Run a command.

    Args:
        command: Program and arguments.
        log: The file for its output.
        env: Environment variables in addition to this process's.

    Raises:
        CommandFailed: If it ends with a status other than 0.
    """
    with open(log, "wb") as file:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env={**os.environ, **(env or {})}
        )
        watcher = _Watcher(process.pid)
        watcher.start()
        status = process.wait()
        seconds = time.perf_counter() - start
        watcher.stop()
    if status:
        tail = log.read_text(errors="replace")[-2000:]
        raise CommandFailed(f"{' '.join(command)}\nended with status {status}:\n{tail}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Sample(seconds, watcher.peak, cpu_seconds)


class _Watcher(threading.Thread):
    """Samples the total resident memory of a process and its children.

    Where the system records the peak of a process, that of the root process is used as well, so that no short peak of
    it is missed. The value that ``wait4`` returns is useless: on Linux it starts at the parent's memory at the time of
    the fork. Pages that several processes share are counted in each.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._pid = pid
        self._stopped = threading.Event()

    def run(self) -> None:
        """Sample until :meth:`stop`."""
        family: list[psutil.Process] = []
        looks = 0
        while not self._stopped.wait(POLL_SECONDS):
            try:
                # Finding children lists all processes, which is too slow for every sample.
                if looks % LOOKS_PER_SEARCH == 0:
                    root = psutil.Process(self._pid)
                    family = [root, *root.children(recursive=True)]
                looks += 1
                resident = sum(process.memory_info().rss for process in family)
            except psutil.Error:
                looks = 0
                continue
            self.peak = max(self.peak, resident, _high_water(self._pid))

    def stop(self) -> None:
        """Stop sampling."""
        self._stopped.set()
        self.join()


def _high_water(pid: int) -> int:
    """The peak resident memory of a process in bytes; 0 if the system does not record it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    _, _, rest = status.partition("VmHWM:")
    return int(rest.split()[0]) * 1024 if rest else 0
