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
    """A measured command did not end with status 0; the message holds the end of what it printed."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one command.

    Attributes:
        seconds: Wall time from the start of the process to its end.
        peak_bytes: The most resident memory that the process and its children had together.
        cpu_seconds: The processor's time that they took, those that were waited for.
    """

    seconds: float
    peak_bytes: int
    cpu_seconds: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def measure(command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> Sample:
    """Run a command to its end.

    Args:
        command: Program and arguments.
        log: Where its output goes.
        env: Variables on top of this process's.

    Raises:
        CommandFailed: It ended with a status other than 0.
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
    """Adds up the resident memory of a process and its children, again and again.

    Where the system keeps a process's high-water mark, the root's counts too, so that no short peak
    between two looks is missed. The usage that ``wait4`` returns would not do: on Linux it starts
    from what the *parent* had when it started the child. Pages that several processes share are
    counted in each.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._pid = pid
        self._stopped = threading.Event()

    def run(self) -> None:
        """Look until stopped."""
        family: list[psutil.Process] = []
        looks = 0
        while not self._stopped.wait(POLL_SECONDS):
            try:
                # Finding children means walking all processes: too dear for every look.
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
        """End, and wait for the end."""
        self._stopped.set()
        self.join()


def _high_water(pid: int) -> int:
    """The most resident memory a process ever had, in bytes; 0 where the system does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    _, _, rest = status.partition("VmHWM:")
    return int(rest.split()[0]) * 1024 if rest else 0
