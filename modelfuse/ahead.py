"""Tensors in stores are sent for before a worker asks for them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from modelfuse.checkpoints import StoredTensor
from modelfuse.memory import SPAN


class Ahead:
    """Sends for the spans that workers will come to, in their order, as far ahead as there is room.

    Args:
        tasks: The sources of each tensor, in the order in which workers begin them.
    """

    def __init__(self, tasks: Iterable[Sequence[StoredTensor]]) -> None:
        self._spans = (
            (sources, first, min(SPAN, sources[0].size - first))
            for sources in tasks
            for first in range(0, sources[0].size, SPAN)
        )
        self._lock = threading.Lock()
        #: Spans that were sent for and have not begun, or have begun before: those are not to be sent for afterwards.
        self._once: set[tuple[int, int]] = set()
        self._next = next(self._spans, None)

    def begin(self, sources: Sequence[StoredTensor], first: int) -> None:
        """Take note that a worker begins a span, and send for what comes next; safe from any thread."""
        if self._next is not None:
            with self._lock:
                self._is_second(sources, first)
            self.send()

    def send(self) -> None:
        """Send for what comes next, as much as there is room for."""
        if not self._lock.acquire(blocking=False):  # Another one does the same.
            return
        try:
            while self._next is not None:
                wanted, start, count = self._next
                if not self._is_second(wanted, start) and not all(each.expect(start, count) for each in wanted):
                    self._once.discard((id(wanted[0]), start))
                    return
                self._next = next(self._spans, None)
        finally:
            self._lock.release()

    def _is_second(self, sources: Sequence[StoredTensor], first: int) -> bool:
        """Whether a span is met for the second time: sent for and begun, in either order."""
        span = (id(sources[0]), first)
        if span in self._once:
            self._once.remove(span)
            return True
        self._once.add(span)
        return False
