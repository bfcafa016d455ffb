"""Run a merge, and measure the disk with a plain read and write of the same size."""

from __future__ import annotations

import os
import shutil
import sys
import time

from measure import Sample, measure
from pages import bring_in, evict
from programs import HERE, Workspace, modelfuse_tool
from works import Work

#: Threads of the plain read, and bytes per block.
HOW = ("8", str(1 << 20))


class Beside:
    """Runs a merge, and plain reads and writes of as many bytes.

    Args:
        space: The workspace.
        work: The merge.
        threads: Threads of the merge.
        warm: Whether the inputs are in the page cache.
    """

    def __init__(self, space: Workspace, work: Work, threads: int, warm: bool) -> None:
        self._workspace, self._work = space, work
        self._tool = modelfuse_tool(space, threads, ["--quiet"])
        self._prepare = bring_in if warm else evict
        self._files = [path for folder in work.inputs(space.reference) for path in folder.glob("*.safetensors")]
        self.bytes = sum(path.stat().st_size for path in self._files)

    def merge(self) -> Sample:
        """Run the merge."""
        self._prepare(self._files)
        os.sync()  # Unwritten data of an earlier run would slow this one down.
        try:
            return measure(self._tool.command(self._work), log=self._workspace.log, env=self._tool.env)
        finally:
            shutil.rmtree(self._workspace.output, ignore_errors=True)

    def read(self) -> float:
        """Read the same inputs; returns GB/s."""
        self._prepare(self._files)
        command = [sys.executable, str(HERE / "reading.py"), *HOW, *map(str, self._files)]
        return self.bytes / 1e9 / measure(command, log=self._workspace.log).seconds

    def write(self, size: int) -> float:
        """Write and sync ``size`` bytes; returns GB/s."""
        block = os.urandom(8 << 20)
        path = self._workspace.work / "written"
        start = time.perf_counter()
        with open(path, "wb", buffering=0) as file:
            for _ in range(0, size, len(block)):
                file.write(block)
            os.fsync(file.fileno())
        seconds = time.perf_counter() - start
        path.unlink()
        return size / 1e9 / seconds
