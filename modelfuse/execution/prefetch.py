"""Prefetch inputs from disks and stores ahead of the workers, and drop them from the page cache afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence

from modelfuse.checkpoints import StoredTensor
from modelfuse.execution.worker import Task
from modelfuse.planning.memory_budget import SPAN
from modelfuse.storage.files import SourceFile
from modelfuse.storage.local.page_cache import Advice, PageCache

#: Bytes to read ahead: enough to keep the disk busy while a method reads a tensor for the second time.
WINDOW = 256 << 20


class Streaming:
    """Prefetches the inputs of the workers.

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
        """Prefetch the first window, before the workers start."""
        with self._lock:
            advices = list(self._ask())
        _give(advices)

    def begin(self, task: Task, first: int, count: int) -> None:
        """A worker starts to read these elements: move the window forward."""
        with self._lock:
            if first < task.begun:
                return
            self._begun += _nbytes(task.sources, first + count - task.begun)
            task.begun = first + count
            advices = list(self._ask())
        _give(advices)

    def passed(self, task: Task, first: int, count: int) -> None:
        """These elements are not read again: they may leave the page cache."""
        advices: list[Advice] = []
        with self._lock:
            for source in task.sources:
                for extent in _extents(source, first, count, first + count == source.size):
                    advices += self._cache.passed(*extent)
        _give(advices)

    def end(self) -> None:
        """Nothing is read any more: release everything that was prefetched."""
        _give(self._cache.leave())

    def _ask(self) -> Iterator[Advice]:
        """Request what is in the window and was not requested yet, until a store's range cache is full."""
        while self._next is not None and self._asked < self._begun + WINDOW:
            task, first, count = self._next
            if first >= task.begun and not all(source.expect(first, count) for source in task.sources):
                return  # The cache is full. (Spans that workers have begun need no prefetch.)
            self._asked += _nbytes(task.sources, count)
            for source in task.sources:
                for extent in _extents(source, first, count, first == 0):
                    yield from self._cache.expect(*extent)
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


def _extents(source: StoredTensor, first: int, count: int, whole: bool) -> Iterator[tuple[SourceFile, int, int]]:
    """The byte ranges of files that a run of elements is read from.

    Tensors that are not stored as they are read count as a whole, at their first or last element.
    """
    if type(source) is StoredTensor:
        yield source.file, source.offset + source.dtype.nbytes(first), source.dtype.nbytes(count)
    elif whole:
        for part in source.made_of:
            yield from _extents(part, 0, part.size, whole)
        if not source.made_of:
            yield source.file, source.offset, source.stored.nbytes(source.size)
