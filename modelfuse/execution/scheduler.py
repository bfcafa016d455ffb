"""Schedule the spans of many procedures on workers.

A procedure (one tensor) yields passes; a pass is cut into spans. Spans of earlier tensors come first, and a new tensor
starts only if no span is ready, so few tensors are in progress, yet no worker idles at the end of a pass. The
assignment of spans to workers never changes a result: findings are collected in the order of the spans or, if a pass
has an order-independent reduction ``fold(one, other)``, reduced pairwise as they arrive. Workers are the threads of a
:class:`Scheduler`, or anything else that takes spans from a :class:`Queue` and reports their findings.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import reduce
from heapq import heappop, heappush
from typing import Any, Generic, TypeVar

from msgspec import Struct, field

from modelfuse.kernels import span_of
from modelfuse.storage.files import keeping_open
from modelfuse.storage.local.threads import join

P = TypeVar("P")
#: Seconds between checks whether workers may go ahead again.
LOOK = 0.05


class Job(Struct, Generic[P]):
    """One procedure in progress.

    Attributes:
        owner: Passed to the walk function, which needs it to process the job's spans.
        procedure: The generator of passes.
        size: The number of elements of the tensor.
    """

    owner: Any
    procedure: Generator[P, list[Any], None]
    size: int
    found: list[Any] = field(default_factory=list)
    waiting: int = 0
    number: int = 0


class Span(Struct, Generic[P], frozen=True):
    """A run of elements of a tensor that one worker processes in one pass.

    Attributes:
        job: The job.
        pass_: The pass.
        first: The index of the first element.
        count: The number of elements.
    """

    job: Job[P]
    pass_: P
    first: int
    count: int


class Queue(Generic[P]):
    """The spans of many jobs that are ready to be processed; thread-safe.

    Args:
        jobs: The jobs; each is begun when no span of an earlier one is ready.
        span: Elements per span.
        may_go_ahead: Whether jobs after the first unfinished one may be worked on. While it returns False, only spans
            of that first job are returned.
    """

    def __init__(self, jobs: Iterable[Job[P]], span: int, may_go_ahead: Callable[[], bool] = lambda: True) -> None:
        self._jobs, self._span, self._may_go_ahead = iter(jobs), span, may_go_ahead
        self._changed = threading.Condition()
        #: A heap, ordered by the job's number and the span's first element.
        self._ready: list[tuple[int, int, Span[P]]] = []
        #: The jobs in progress, by number, in order.
        self._under_way: dict[int, Job[P]] = {}
        self._begun = 0
        #: The first error; no more spans are returned after it.
        self.failure: BaseException | None = None

    def take(self, wait: bool = True) -> Span[P] | None:
        """The next span; begins a new job if no span is ready.

        Args:
            wait: Whether to wait until the spans that are being processed make others ready.

        Returns:
            None when all jobs have ended or one has failed or, without ``wait``, if no span is ready.
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
        """Report the findings of spans of one pass.

        Args:
            spans: Spans of one pass.
            found: The finding of each span; for a pass with ``fold``, they may already be folded into fewer.
            goes_on: Whether the caller can process the job's next pass at once if it is a single span: the elements
                are still in its buffers.

        Returns:
            That next span, if there is one.
        """
        job, pass_ = spans[0].job, spans[0].pass_
        if fold := fold_of(pass_):
            own = reduce(fold, found)
            # Each worker takes the pending finding out and folds it outside the lock, so that no one waits meanwhile.
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
        """Return no more spans; the first error is kept."""
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
        """Take the pending finding of other spans; if there is none, leave ``found`` there and return None."""
        with self._changed:
            if job.found:
                return job.found.pop()
            job.found.append(found)
            return None


class Scheduler(Generic[P]):
    """Runs jobs on worker threads.

    Args:
        walk: Processes one span on a worker thread and returns its finding. It is called with the worker's number, the
            job's owner, the pass, the first element and the number of elements.
        workers: The number of threads.
        span: Elements per span.
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
            BaseException: What the first failing worker raised; the others stop after their current slice.
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
            # No more threads can be started: continue with fewer or, without any, in this one.
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
        """Whether a worker has failed, so that the others should stop."""
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
    """The pass's order-independent reduction of two findings; None if it has none."""
    return getattr(pass_, "fold", None)


def _advance(job: Job[P]) -> P | None:
    try:
        return job.procedure.send(job.found)
    except StopIteration:
        return None
