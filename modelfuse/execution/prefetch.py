"""Inputs stream: what workers read next comes from disks and stores while they compute, and makes room after them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence

from modelfuse.checkpoints import StoredTensor
from modelfuse.execution.worker import Task
from modelfuse.planning.memory_budget import SPAN
from modelfuse.storage.files import SourceFile
from modelfuse.storage.local.page_cache import Advice, PageCache

#: Bytes on their way from the disk: enough to keep it busy while methods walk a tensor for a second time.
WINDOW = 256 << 20


class Streaming:
    """Keeps disks and stores ahead of the workers.

    Args:
        order: All tasks, in the order in which their spans are begun.
    """

    def __init__(self, order: Iterable[Task]) -> None:
        self._order = _spans(order)
        self._cache = PageCache()
        self._lock = threading.Lock()
        self._asked = self._begun = 0
        self._next = next(self._order, None)

    def start(self) -> None:
        """Workers will soon begin."""
        with self._lock:
            advices = list(self._ask())
        _give(advices)

    def begin(self, task: Task, first: int, count: int) -> None:
        """Some elements are going to be read now."""
        with self._lock:
            if first < task.begun:
                return
            self._begun += _nbytes(task.sources, first + count - task.begun)
            task.begun = first + count
            advices = list(self._ask())
        _give(advices)

    def passed(self, task: Task, first: int, count: int) -> None:
        """Some elements are not going to be read again."""
        advices: list[Advice] = []
        with self._lock:
            for source in task.sources:
                for place in _places(source, first, count, first + count == source.size):
                    advices += self._cache.passed(*place)
        _give(advices)

    def end(self) -> None:
        """Nothing is going to be read any more."""
        _give(self._cache.leave())

    def _ask(self) -> Iterator[Advice]:
        """For what is in the window and was not asked for, as long as there is room."""
        while self._next is not None and self._asked < self._begun + WINDOW:
            task, first, count = self._next
            if first >= task.begun and not all(source.expect(first, count) for source in task.sources):
                return  # What has begun is being read already.
            self._asked += _nbytes(task.sources, count)
            for source in task.sources:
                for place in _places(source, first, count, first == 0):
                    yield from self._cache.expect(*place)
            self._next = next(self._order, None)


def _give(advices: Iterable[Advice]) -> None:
    for advice in advices:
        advice.give()


def _spans(order: Iterable[Task]) -> Iterator[tuple[Task, int, int]]:
    for task in order:
        size = task.sources[0].size
        for first in range(0, size, SPAN):
            yield task, first, min(SPAN, size - first)


def _nbytes(sources: Sequence[StoredTensor], count: int) -> int:
    return sum(source.stored.nbytes(count) for source in sources)


def _places(source: StoredTensor, first: int, count: int, whole: bool) -> Iterator[tuple[SourceFile, int, int]]:
    """Where in files a run of elements comes from. What is not stored as it is read counts as a whole, at one end."""
    if type(source) is StoredTensor:
        yield source.file, source.offset + source.dtype.nbytes(first), source.dtype.nbytes(count)
    elif whole:
        for part in source.made_of:
            yield from _places(part, 0, part.size, whole)
        if not source.made_of:
            yield source.file, source.offset, source.stored.nbytes(source.size)
