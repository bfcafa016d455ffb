"""Inputs stream: what workers read next comes from the disk while they compute, and makes room after them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.files import SourceFile
from modelfuse.checkpoints.page_cache import Advice, PageCache
from modelfuse.memory import SPAN
from modelfuse.walking import Task

#: Bytes on their way from the disk: enough to keep it busy while methods walk a tensor for a second time.
WINDOW = 256 << 20
#: The tensors that are read together.
Sources = Sequence[StoredTensor]


class Streaming:
    """Keeps the disk ahead of the workers.

    Args:
        order: The sources of every tensor, in the order in which their spans are begun.
    """

    def __init__(self, order: Iterable[Sources]) -> None:
        self._order = _spans(order)
        self._cache = PageCache()
        self._lock = threading.Lock()
        self._asked = self._begun = 0

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
        """For what is in the window and was not asked for."""
        while self._asked < self._begun + WINDOW and (span := next(self._order, None)) is not None:
            sources, first, count = span
            self._asked += _nbytes(sources, count)
            for source in sources:
                for place in _places(source, first, count, first == 0):
                    yield from self._cache.expect(*place)


def _give(advices: Iterable[Advice]) -> None:
    for advice in advices:
        advice.give()


def _spans(order: Iterable[Sources]) -> Iterator[tuple[Sources, int, int]]:
    for sources in order:
        size = sources[0].size
        for first in range(0, size, SPAN):
            yield sources, first, min(SPAN, size - first)


def _nbytes(sources: Sources, count: int) -> int:
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
