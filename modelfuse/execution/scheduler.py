"""Workers that walk many procedures at once.

A procedure (one tensor) yields passes; a pass is cut into spans. Spans of the tensors begun first come before those of
others, and before new tensors, so few are under way at a time, and the next one starts while the last spans of a pass
are still being walked. Which worker does what never changes a result: what the spans find is collected in their order,
or, by a pass with a method ``fold(one, other)`` for which order means nothing, made one as soon as there are two.
Workers are the threads of a :class:`Scheduler`, or whatever else takes spans from a :class:`Queue` and says what they
found.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from heapq import heappop, heappush
from typing import Any, Generic, TypeVar

from modelfuse.kernels import span_of
from modelfuse.storage.files import keeping_open
from modelfuse.storage.local.threads import join

P = TypeVar("P")
#: Seconds between two looks whether workers may go ahead again.
LOOK = 0.05


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
    number: int = 0


@dataclass(frozen=True, slots=True)
class Span(Generic[P]):
    """A part of a pass that one worker walks.

    Attributes:
        job: Whose.
        pass_: The pass.
        first: The first element.
        count: The number of elements.
    """

    job: Job[P]
    pass_: P
    first: int
    count: int


class Queue(Generic[P]):
    """The spans of many jobs, each once it can be walked; safe from any thread.

    Args:
        jobs: All of them; each is begun when nothing else is ready.
        span: Elements a span.
        may_go_ahead: Whether spans may be given out of others than the first job that has not ended. While they may
            not, it goes on alone.
    """

    def __init__(self, jobs: Iterable[Job[P]], span: int, may_go_ahead: Callable[[], bool] = lambda: True) -> None:
        self._jobs, self._span, self._may_go_ahead = iter(jobs), span, may_go_ahead
        self._changed = threading.Condition()
        #: With the number of their job and their first element, by which they are ordered.
        self._ready: list[tuple[int, int, Span[P]]] = []
        #: The jobs that have begun and not ended, in their order.
        self._under_way: dict[int, Job[P]] = {}
        self._begun = 0
        #: Why nothing more is given out.
        self.failure: BaseException | None = None

    def take(self, wait: bool = True) -> Span[P] | None:
        """The next span; begins a new job if none is ready.

        Args:
            wait: Whether to wait for spans that others must walk first.

        Returns:
            None when all is done or failed or, without ``wait``, when there is nothing now.
        """
        with self._changed:
            while self.failure is None:
                goes_ahead = not self._under_way or self._may_go_ahead()
                if self._ready and (goes_ahead or self._ready[0][0] == next(iter(self._under_way))):
                    return heappop(self._ready)[2]
                job = next(self._jobs, None) if goes_ahead else None
                if job is not None:
                    job.number, self._begun = self._begun, self._begun + 1
                    self._under_way[job.number] = job
                    self._enqueue(job, next(job.procedure))
                elif not self._under_way or not wait:
                    return None
                else:
                    self._changed.wait(None if goes_ahead else LOOK)
            return None

    def done(self, spans: Sequence[Span[P]], found: Sequence[Any], *, goes_on: bool = False) -> Span[P] | None:
        """Say what spans of one pass have found, one after another; of a pass that folds, perhaps folded already.

        Args:
            spans: Spans of one pass.
            found: What each has found.
            goes_on: Whether the caller walks the job's next pass if that is one span: it has the elements at hand.

        Returns:
            That span, if there is one.
        """
        job, pass_ = spans[0].job, spans[0].pass_
        if fold := fold_of(pass_):
            own = reduce(fold, found)
            # Whoever finds what others have found takes it away, so that nobody waits while it is added up.
            while (other := self._take_or_leave(job, own)) is not None:
                own = fold(other, own)
        with self._changed:
            if not fold:
                for span, each in zip(spans, found, strict=True):
                    job.found[span.first // span_of(pass_, self._span)] = each
            job.waiting -= len(spans)
            if job.waiting:
                return None
        following = _advance(job)
        if goes_on and following is not None and job.size <= span_of(following, self._span) and self.failure is None:
            job.found, job.waiting = [] if fold_of(following) else [None], 1
            return Span(job, following, 0, job.size)
        with self._changed:
            if following is not None:
                self._enqueue(job, following)
            else:
                del self._under_way[job.number]
                self._changed.notify_all()
        return None

    def fail(self, error: BaseException) -> None:
        """Give out nothing more; the first error counts."""
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()

    def _enqueue(self, job: Job[P], pass_: P) -> None:
        span = span_of(pass_, self._span)
        spans = [(first, min(span, job.size - first)) for first in range(0, job.size, span)]
        job.found, job.waiting = [] if fold_of(pass_) else [None] * len(spans), len(spans)
        for first, count in spans:
            heappush(self._ready, (job.number, first, Span(job, pass_, first, count)))
        self._changed.notify_all()

    def _take_or_leave(self, job: Job[P], found: Any) -> Any:
        """What other spans have found, now the caller's; None if there was nothing: then ``found`` is left there."""
        with self._changed:
            if job.found:
                return job.found.pop()
            job.found.append(found)
            return None


class Scheduler(Generic[P]):
    """Runs jobs on worker threads.

    Args:
        walk: Walks one span and returns what it found; runs on the workers. It is given the worker's number, the
            job's owner, the pass, the first element and the number of elements.
        workers: How many threads.
        span: Elements a span.
        may_go_ahead: See :class:`Queue`.
    """

    def __init__(
        self,
        walk: Callable[[int, Any, P, int, int], Any],
        workers: int,
        span: int,
        may_go_ahead: Callable[[], bool] = lambda: True,
    ) -> None:
        self._walk, self._workers, self._span, self._may_go_ahead = walk, workers, span, may_go_ahead
        self._queue: Queue[P] = Queue((), span)

    def run(self, jobs: Iterable[Job[P]]) -> None:
        """Run all jobs to their end.

        Raises:
            BaseException: What the first failing worker raised; the others stop after their slice of work.
        """
        self._queue = Queue(jobs, self._span, self._may_go_ahead)
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
            self._queue.fail(interruption)
        join(threads, self._queue.fail)
        if self._queue.failure is not None:
            raise self._queue.failure

    @property
    def stopping(self) -> bool:
        """Whether a worker has failed, so that the others should not go on."""
        return self._queue.failure is not None

    def _work(self, number: int) -> None:
        try:
            with keeping_open():
                self._walk_all(number)
        except BaseException as error:
            self._queue.fail(error)

    def _walk_all(self, number: int) -> None:
        span: Span[P] | None = None
        while (span := span or self._queue.take()) is not None:
            found = self._walk(number, span.job.owner, span.pass_, span.first, span.count)
            span = self._queue.done((span,), (found,), goes_on=True)


def fold_of(pass_: object) -> Callable[[Any, Any], Any] | None:
    """What makes one of what two spans of a pass found, in any order; None if their order means something."""
    return getattr(pass_, "fold", None)


def _advance(job: Job[P]) -> P | None:
    try:
        return job.procedure.send(job.found)
    except StopIteration:
        return None
