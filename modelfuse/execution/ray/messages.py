"""Messages between the driver and the nodes of a cluster."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modelfuse.errors import ClusterError, ModelfuseError
from modelfuse.execution.worker import BufferSizes, Task
from modelfuse.kernels import Bytes, Pass
from modelfuse.kernels.backends import Device


@dataclass(frozen=True, slots=True)
class Shipment:
    """What a node needs for a merge; sent once.

    Attributes:
        folder: The folder of the weight files; None: output is sent to the driver.
        token: The name of a file in that folder that exists as long as the merge runs.
        device: The device to compute on.
        sizes: The sizes of a worker's buffers.
        tasks: All tasks; spans refer to theirs by its index.
    """

    folder: Path | None
    token: str
    device: Device
    sizes: BufferSizes
    tasks: tuple[Task, ...]


class PassSpans(NamedTuple):
    """Spans of one pass.

    Attributes:
        task: The index of the task.
        pass_: The pass.
        spans: The first element and the number of elements of each span.
    """

    task: int
    pass_: Pass
    spans: list[tuple[int, int]]


class Piece(NamedTuple):
    """Output that a node sends to the driver: the index of the task, the first element and the bytes."""

    task: int
    start: int
    data: Bytes


class Done(NamedTuple):
    """The reply for a processed batch.

    Attributes:
        walked: Packed: for each :class:`PassSpans`, a list of the spans' results, or of one result with their folded
            findings.
        pieces: Output for the driver to write.
    """

    walked: Bytes
    pieces: list[Piece]


class Failed(NamedTuple):
    """The reply for a failed batch.

    Attributes:
        error: Packed: the error and its cause.
        node: The node's name.
        tensor: The tensor that was being processed.
        trace: The formatted traceback.
    """

    error: Bytes
    node: str
    tensor: str
    trace: str

    @classmethod
    def of(cls, error: Exception, node: str, tensor: str, trace: str) -> Failed:
        """Pack an error."""
        try:
            packed = pack((error, error.__cause__))
            unpack(packed)
        except Exception:  # Not every error can be pickled.
            packed = pack((RuntimeError(f"{type(error).__name__}: {error}"), None))
        return cls(packed, node, tensor, trace)

    def restore(self) -> Exception:
        """The error with its cause, and with notes that say where it was raised."""
        error: Exception
        cause: BaseException | None
        error, cause = unpack(self.error)
        error.__cause__ = cause
        if self.tensor and not is_final(error):
            error.add_note(f"{self.node} was processing {self.tensor!r}.")
        if not isinstance(error, ModelfuseError | OSError | MemoryError):
            error.add_note(self.trace)
        return error


def is_final(error: Exception) -> bool:
    """Whether a retry cannot help: the request or an input is at fault, not a node, a disk or the network."""
    if isinstance(error, ClusterError):
        return False
    return isinstance(error, ModelfuseError) and not isinstance(error.__cause__, OSError)


def pack(content: object) -> Bytes:
    """Pickle to a byte array, which Ray passes on unchanged.

    Arrays that Ray serializes itself arrive read-only: another type to numba, which would compile the kernels again.
    """
    return np.frombuffer(pickle.dumps(content, 5), np.uint8)


def unpack(packed: Bytes) -> Any:
    """The content of :func:`pack`'s result."""
    return pickle.loads(packed.data)
