"""What this machine and the nodes of a cluster send each other."""

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
    """What a node must know of a merge: sent once.

    Attributes:
        folder: Where to write the weight files; None: what would be written is sent back.
        token: A file in that folder, there as long as the merge runs.
        device: Where to compute.
        sizes: How large a worker's buffers are.
        tasks: All tasks; spans name theirs by its number.
    """

    folder: Path | None
    token: str
    device: Device
    sizes: BufferSizes
    tasks: tuple[Task, ...]


class PassSpans(NamedTuple):
    """Spans of one pass.

    Attributes:
        task: The number of the task.
        pass_: The pass.
        spans: The first element and the number of elements of each.
    """

    task: int
    pass_: Pass
    spans: list[tuple[int, int]]


class Piece(NamedTuple):
    """Bytes of a tensor that a node did not write itself: the task's number, the first element, and the bytes."""

    task: int
    start: int
    data: Bytes


class Done(NamedTuple):
    """A batch of spans was walked.

    Attributes:
        walked: Packed: for each part, what walking its spans has come to, or one for all that they found together.
        pieces: What is still to be written.
    """

    walked: Bytes
    pieces: list[Piece]


class Failed(NamedTuple):
    """A batch of spans was not walked to its end.

    Attributes:
        error: Packed: the error, and its cause.
        node: Where.
        tensor: What was being walked.
        trace: Where in the program.
    """

    error: Bytes
    node: str
    tensor: str
    trace: str

    @classmethod
    def of(cls, error: Exception, node: str, tensor: str, trace: str) -> Failed:
        """What an error has ended."""
        try:
            packed = pack((error, error.__cause__))
            unpack(packed)
        except Exception:  # Not every error can be sent.
            packed = pack((RuntimeError(f"{type(error).__name__}: {error}"), None))
        return cls(packed, node, tensor, trace)

    def restore(self) -> Exception:
        """The error, with its cause, and with notes on where it was raised."""
        error: Exception
        cause: BaseException | None
        error, cause = unpack(self.error)
        error.__cause__ = cause
        if self.tensor and not is_final(error):
            error.add_note(f"{self.node} was at work on {self.tensor!r}.")
        if not isinstance(error, ModelfuseError | OSError | MemoryError):
            error.add_note(self.trace)
        return error


def is_final(error: Exception) -> bool:
    """Whether to try again is of no use: the request or an input is at fault, not a node, a disk or a network."""
    if isinstance(error, ClusterError):
        return False
    return isinstance(error, ModelfuseError) and not isinstance(error.__cause__, OSError)


def pack(content: object) -> Bytes:
    """As bytes that Ray hands on as they are.

    Arrays that Ray itself packs arrive as read-only ones, for which kernels would be compiled again.
    """
    return np.frombuffer(pickle.dumps(content, 5), np.uint8)


def unpack(packed: Bytes) -> Any:
    """What was packed."""
    return pickle.loads(packed.data)
