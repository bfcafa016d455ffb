"""Workers that walk many procedures at once.

A procedure (one tensor) yields passes; a pass is cut into spans. Spans of the tensors already begun come before
new tensors, so few are under way at a time, and the next one starts while the last spans of a pass are still
being walked. Which worker does what never changes a result: what the spans find is collected in their order, or, by a
pass with a method ``fold(one, other)`` for which order means nothing, made one as soon as there are two.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

P = TypeVar("P")
#: A span: the job's own value, the pass, the first element and the number of elements.
Walk = Callable[[Any, P, int, int], Any]


@dataclass
class Job(Generic[P]):
    """One procedure under way.

    Attributes:
        owner: What the walk function is to know of it.
        procedure: The generator of passes.
        size: The number of elements that every pass walks.
    """

    owner: Any
    procedure: Generator[P, list[Any], None]
    size: int
    found: list[Any] = field(default_factory=list)
    waiting: int = 0


class Scheduler(Generic[P]):
    """Runs jobs on worker threads.

    Args:
        walk: Walks one span and returns what it found; runs on the workers.
        workers: How many threads.
        span: Elements a span.
    """

    def __init__(self, walk: Callable[[int, Any, P, int, int], Any], workers: int, span: int) -> None:
        self._walk, self._workers, self._span = walk, workers, span
        self._changed = threading.Condition()
        self._ready: deque[tuple[Job[P], P, int, int]] = deque()
        self._under_way = 0
        self._failure: BaseException | None = None

    def run(self, jobs: Iterable[Job[P]]) -> None:
        """Run all jobs to their end.

        Raises:
            BaseException: What the first failing worker raised; the others stop after their slice of work.
        """
        self._jobs = iter(jobs)
        threads: list[threading.Thread] = []
        try:
            for number in range(self._workers):
                thread = threading.Thread(target=self._work, args=(number,), name=f"worker {number}", daemon=True)
                threads.append(thread)
                thread.start()
            for thread in threads:
                thread.join()
        except RuntimeError:
            # The system gives no more threads: fewer do the same work, and if there is none, this one does.
            threads.pop()
            if not threads:
                self._work(0)
        except BaseException as interruption:
            self._fail(interruption)
        join(threads, self._fail)
        if self._failure is not None:
            raise self._failure

    @property
    def stopping(self) -> bool:
        """Whether a worker has failed, so that the others should not go on."""
        return self._failure is not None

    def _work(self, number: int) -> None:
        try:
            while (task := self._next()) is not None:
                job, pass_, first, count = task
                found = self._walk(number, job.owner, pass_, first, count)
                self._done(job, pass_, first, found)
        except BaseException as error:
            self._fail(error)

    def _next(self) -> tuple[Job[P], P, int, int] | None:
        """The next span; begins a new job if none is ready; None when all is done or failed."""
        with self._changed:
            while self._failure is None:
                if self._ready:
                    return self._ready.popleft()
                job = next(self._jobs, None)
                if job is not None:
                    self._under_way += 1
                    self._enqueue(job, next(job.procedure))
                elif self._under_way == 0:
                    return None
                else:
                    self._changed.wait()
            return None

    def _enqueue(self, job: Job[P], pass_: P) -> None:
        spans = [(first, min(self._span, job.size - first)) for first in range(0, job.size, self._span)]
        job.found, job.waiting = [] if _fold_of(pass_) else [None] * len(spans), len(spans)
        self._ready.extendleft((job, pass_, first, count) for first, count in reversed(spans))
        self._changed.notify_all()

    def _done(self, job: Job[P], pass_: P, first: int, found: Any) -> None:
        if fold := _fold_of(pass_):
            # Whoever finds what others have found takes it away, so that nobody waits while it is added up.
            while (other := self._take_or_leave(job, found)) is not None:
                found = fold(other, found)
        with self._changed:
            if not fold:
                job.found[first // self._span] = found
            job.waiting -= 1
            if job.waiting:
                return
        following = _advance(job)
        with self._changed:
            if following is not None:
                self._enqueue(job, following)
            else:
                self._under_way -= 1
                self._changed.notify_all()

    def _take_or_leave(self, job: Job[P], found: Any) -> Any:
        """What other spans have found, now the caller's; None if there was nothing: then ``found`` is left there."""
        with self._changed:
            if job.found:
                return job.found.pop()
            job.found.append(found)
            return None

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()


def _fold_of(pass_: object) -> Callable[[Any, Any], Any] | None:
    return getattr(pass_, "fold", None)


def _advance(job: Job[P]) -> P | None:
    try:
        return job.procedure.send(job.found)
    except StopIteration:
        return None


def join(threads: Iterable[threading.Thread], interrupted: Callable[[BaseException], None] | None = None) -> None:
    """Wait for threads to end, whatever interrupts that: they write to files that are about to be closed.

    Args:
        threads: Which.
        interrupted: Is told of an interruption at once; without it, the last one is raised at the end.
    """
    last: BaseException | None = None
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except BaseException as interruption:
                last = interruption
                if interrupted is not None:
                    interrupted(interruption)
    if last is not None and interrupted is None:
        raise last
