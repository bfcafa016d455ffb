"""Code that runs on the nodes of a cluster: processes batches of spans in Ray's worker processes."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import ray

from modelfuse.checkpoints.output.failures import cannot_write
from modelfuse.errors import ClusterError, ModelfuseError
from modelfuse.execution.ray.messages import Done, Failed, PassSpans, Piece, Shipment, pack, unpack
from modelfuse.execution.report_writer import SpanResult
from modelfuse.execution.scheduler import fold_of
from modelfuse.execution.worker import Task, Worker
from modelfuse.kernels import Bytes
from modelfuse.kernels.backends import choose
from modelfuse.planning.operations import Operation
from modelfuse.storage import configure_cache
from modelfuse.storage.local.journal import write_all
from modelfuse.version import __version__


class NodeWorker:
    """The state of this process for one merge.

    Args:
        shipment: What the driver has sent.
    """

    def __init__(self, shipment: Shipment) -> None:
        self._shipment = shipment
        configure_cache(shipment.sizes.fetched, shipment.sizes.keeps)
        self._worker = Worker(choose(shipment.device), shipment.sizes)
        #: The name of the tensor that is being processed.
        self.tensor = ""

    def check(self) -> None:
        """Check that this node sees the output folder and that the merge is still running.

        Raises:
            ClusterError: If not.
        """
        folder = self._shipment.folder
        if folder is None or os.path.exists(folder / self._shipment.token):
            return
        # NFS caches that a file does not exist; listing its folder refreshes that.
        for parent in (folder.parent, folder):
            if os.path.isdir(parent):
                os.listdir(parent)
        if not os.path.exists(folder / self._shipment.token):
            raise ClusterError(
                f"{name()} cannot see {folder}", "output_path must lie on a filesystem that all nodes share."
            )

    def check_inputs(self) -> None:
        """See the function :func:`check_inputs`."""
        check_inputs(self._shipment.tasks)

    def walk(self, parts: list[PassSpans]) -> Done:
        """Process the spans of a batch and sync their output."""
        files = _Files(self._shipment.folder)
        try:
            walked = [self._walk_part(part, files) for part in parts]
            files.sync()
        finally:
            files.close()
        return Done(pack(walked), files.pieces)

    def _walk_part(self, part: PassSpans, files: _Files) -> list[SpanResult]:
        task = self._shipment.tasks[part.task]
        self.tensor = (task.tensor or task.sources[0]).name
        files.task = part.task
        walked = [self._worker.walk(task, part.pass_, first, count, files.write) for first, count in part.spans]
        fold = fold_of(part.pass_)
        return walked if fold is None else [SpanResult(reduce(fold, (each.found for each in walked)))]


def check_inputs(tasks: Sequence[Task]) -> None:
    """Check that the input files of tasks can be opened and are unchanged.

    Raises:
        CheckpointError: If one cannot be opened, or was changed.
    """
    for file in {file for task in tasks for source in task.sources for file in source.files}:
        with file.open():
            pass


class _Files:
    """The output files that a batch writes to; without a folder, output is collected in ``pieces``."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._descriptors: dict[Path, int] = {}
        self.task = 0
        self.pieces: list[Piece] = []

    def write(self, tensor: Operation, start: int, data: Bytes) -> None:
        if self._folder is None:
            self.pieces.append(Piece(self.task, start, data.copy()))
            return
        path = self._folder / tensor.file
        try:
            if path not in self._descriptors:
                # Write-only: opened for reading, NFS would read whole pages and write other nodes' bytes back later.
                self._descriptors[path] = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            write_all(self._descriptors[path], data.data, tensor.offset + tensor.dtype.nbytes(start))
        except OSError as error:
            raise cannot_write(error, path) from error

    def sync(self) -> None:
        """Sync the files: only output that survives a crash of this node may be reported as done."""
        for path, descriptor in self._descriptors.items():
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise cannot_write(error, path) from error

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def name() -> str:
    """This node's name in error messages."""
    return f"The node {socket.gethostname()} (Ray's {ray.get_runtime_context().get_node_id()[:8]})"


#: The state of the last merge that this process worked for, by token.
_last: dict[str, NodeWorker] = {}


def _worker(version: str, token: str, shipment: Bytes) -> NodeWorker:
    if token not in _last:
        if version != __version__:
            raise ClusterError(
                f"{name()} has modelfuse {__version__}, this machine has {version}",
                "Install the same version on all nodes.",
            )
        _last.clear()
        _last[token] = NodeWorker(unpack(shipment))
    worker = _last[token]
    worker.check()
    return worker


def look(version: str, token: str, shipment: Bytes) -> Failed | None:
    """Why this node cannot take part in the merge; None if it can."""
    try:
        _worker(version, token, shipment).check_inputs()
    except ModelfuseError as error:
        return Failed.of(error, name(), "", "")
    return None


def walk(version: str, token: str, shipment: Bytes, parts: Bytes, pause: float) -> Done | Failed:
    """Process a batch of spans.

    Args:
        version: The driver's version of modelfuse.
        token: Identifies the merge.
        shipment: The packed :class:`Shipment`.
        parts: The batch: a packed list of :class:`PassSpans`.
        pause: Seconds to wait first.
    """
    time.sleep(pause)
    worker = None
    try:
        worker = _worker(version, token, shipment)
        return worker.walk(unpack(parts))
    except Exception as error:
        return Failed.of(error, name(), worker.tensor if worker is not None else "", traceback.format_exc())
