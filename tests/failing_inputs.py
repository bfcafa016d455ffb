"""Inputs that are slow or fail on the nodes of a cluster; stored tensors are sent to nodes, so these are, too."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.tensors import Reader
from modelfuse.errors import CheckpointError
from modelfuse.execution import run as running
from modelfuse.execution.worker import Tasks
from modelfuse.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class FailingTensor(StoredTensor):
    """A stored tensor that is slow or fails when it is opened.

    Attributes:
        how: ``slow``, ``disk``, ``bug``, ``memory``, ``crash``, or ``once``, which crashes the first time only.
        visits: A folder, which gets a file for each attempt to open the tensor.
    """

    how: str
    visits: Path

    @contextmanager
    def open(self) -> Iterator[Reader]:
        first = not os.listdir(self.visits)
        (self.visits / uuid.uuid4().hex).touch()
        if self.how == "slow":
            time.sleep(0.2)
        elif self.how == "disk":
            try:
                raise OSError(5, "Input/output error")
            except OSError as error:
                raise CheckpointError(f"{self.file.path}: {error.strerror} at byte 5") from error
        elif self.how == "bug":
            raise ZeroDivisionError("nobody had thought of that")
        elif self.how == "memory":
            raise MemoryError("a terabyte was asked for")
        elif self.how == "crash" or (self.how == "once" and first):
            os.kill(os.getpid(), 9)
        # super() without arguments does not work in a dataclass with slots.
        with StoredTensor.open(self) as read:
            yield read


def make_fail(monkeypatch: pytest.MonkeyPatch, visits: Path, how: str, which: Callable[[str], bool]) -> Path:
    """Make the first source of some tensors fail in merges on a cluster; returns ``visits``."""
    visits.mkdir()

    class FailingTasks:
        @staticmethod
        def of(plan: Plan) -> Tasks:
            tasks = Tasks.of(plan)
            for task in tasks.tensors:
                one, *others = task.sources
                if which(one.name):
                    failing = FailingTensor(one.name, one.dtype, one.shape, one.file, one.offset, how, visits)
                    task.sources = (failing, *others)
            return tasks

    monkeypatch.setattr(running, "Tasks", FailingTasks)
    return visits
