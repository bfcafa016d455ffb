"""Workers that walk many procedures: nothing is lost, nothing is mixed up, nothing hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

from modelfuse.execution.scheduler import Job, Queue, Scheduler

#: Far longer than any of these takes: a run that is still going on hangs.
HANGS = 60.0
Spans = list[tuple[int, int]]


class Broken(Exception):
    """What workers raise here."""


def in_time(action: Callable[[], None]) -> None:
    """Run ``action``; fail if it does not end, raise what it raises."""
    raised: list[BaseException] = []

    def target() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(HANGS)
    assert not thread.is_alive(), "the scheduler hangs"
    if raised:
        raise raised[0]


def procedure(passes: int, log: list[list[Any]]) -> Generator[int, list[Any], None]:
    """So many passes, which are their numbers; logs what each is sent."""
    for number in range(passes):
        found = yield number
        log.append(found)


def tile(size: int, span: int) -> Spans:
    return [(first, min(span, size - first)) for first in range(0, size, span)]


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize(("size", "span"), [(1, 1), (1, 100), (100, 100), (101, 100), (1000, 7)])
def test_every_pass_is_sent_what_its_spans_found_in_their_order(workers: int, size: int, span: int) -> None:
    log: list[list[Any]] = []
    scheduler: Scheduler[int] = Scheduler(
        lambda _, owner, pass_, first, count: (owner, pass_, first, count), workers, span
    )
    in_time(lambda: scheduler.run(iter([Job("owner", procedure(3, log), size)])))
    assert log == [[("owner", pass_, *each) for each in tile(size, span)] for pass_ in range(3)]


@pytest.mark.parametrize("workers", [1, 3, 16])
def test_many_tiny_jobs_of_different_numbers_of_passes(workers: int) -> None:
    logs: list[list[list[Any]]] = [[] for _ in range(3000)]
    jobs = (Job(number, procedure(number % 4 + 1, log), number % 5 + 1) for number, log in enumerate(logs))
    scheduler: Scheduler[int] = Scheduler(
        lambda _, owner, pass_, first, count: (owner, pass_, first, count), workers, 2
    )
    in_time(lambda: scheduler.run(jobs))
    for number, log in enumerate(logs):
        expected = [[(number, pass_, *each) for each in tile(number % 5 + 1, 2)] for pass_ in range(number % 4 + 1)]
        assert log == expected


@pytest.mark.parametrize("workers", [1, 4])
def test_no_jobs_are_no_work(workers: int) -> None:
    scheduler: Scheduler[int] = Scheduler(lambda *_: pytest.fail("there is nothing to walk"), workers, 1)
    in_time(lambda: scheduler.run(iter(())))


def test_a_pass_begins_when_all_spans_of_the_last_one_are_done() -> None:
    lock = threading.Lock()
    walked: list[int] = []

    def walk(worker: int, owner: Any, pass_: int, first: int, count: int) -> None:
        del worker, owner, first, count
        with lock:
            walked.append(pass_)

    scheduler: Scheduler[int] = Scheduler(walk, 5, 3)
    in_time(lambda: scheduler.run(iter([Job(None, procedure(4, []), 100)])))
    assert walked == sorted(walked)
    assert len(walked) == 4 * len(tile(100, 3))


def test_spans_of_jobs_under_way_come_before_new_jobs() -> None:
    """With one worker, each job is finished before the next one is begun."""
    begun: list[tuple[int, int]] = []
    scheduler: Scheduler[int] = Scheduler(lambda _, owner, pass_, *__: begun.append((owner, pass_)), 1, 4)
    in_time(lambda: scheduler.run(Job(number, procedure(2, []), 10) for number in range(5)))
    assert begun == sorted(begun)


def test_spans_of_the_job_begun_first_come_first() -> None:
    queue: Queue[int] = Queue((Job(number, procedure(2, []), 8) for number in range(2)), 4)
    taken = [queue.take() for _ in range(4)]
    spans = [span for span in taken if span is not None]
    assert [(span.job.owner, span.first) for span in spans] == [(0, 0), (0, 4), (1, 0), (1, 4)]
    queue.done(spans[2:], [None, None])  # The second job begins its second pass before the first one does.
    queue.done(spans[:2], [None, None])
    assert [span.job.owner for _ in range(4) if (span := queue.take()) is not None] == [0, 0, 1, 1]


def test_only_the_first_job_goes_on_while_nothing_may_go_ahead() -> None:
    may = True
    queue: Queue[int] = Queue((Job(number, procedure(2, []), 8) for number in range(3)), 4, lambda: may)
    first, second, other = queue.take(), queue.take(), queue.take()
    assert first is not None
    assert second is not None
    assert other is not None
    assert other.job.owner == 1
    may = False
    assert queue.take(wait=False) is None  # Neither the rest of the second job nor the third one.
    queue.done([first, second], [None, None])
    following = [queue.take(wait=False), queue.take(wait=False), queue.take(wait=False)]
    assert [span and (span.job.owner, span.pass_) for span in following] == [(0, 1), (0, 1), None]
    queue.done([span for span in following if span is not None], [None, None])
    rest = queue.take(wait=False)
    assert rest is not None
    assert (rest.job.owner, rest.first) == (1, 4)


@pytest.mark.parametrize("workers", [1, 5])
def test_nothing_hangs_while_nothing_may_go_ahead(workers: int) -> None:
    log: list[list[Any]] = []
    scheduler: Scheduler[int] = Scheduler(lambda *_: None, workers, 3, lambda: False)
    in_time(lambda: scheduler.run(Job(number, procedure(3, log), 10) for number in range(6)))
    assert len(log) == 6 * 3


def test_jobs_are_begun_one_at_a_time_as_workers_need_them() -> None:
    """A plan of many tensors must not become as many procedures under way."""
    done: list[int] = []
    most = 0

    def jobs() -> Iterator[Job[int]]:
        nonlocal most
        for number in range(200):
            most = max(most, number - len(done))
            yield Job(number, finishing(number), 8)

    def finishing(number: int) -> Generator[int, list[Any], None]:
        yield 0
        yield 1
        done.append(number)

    scheduler: Scheduler[int] = Scheduler(lambda *_: None, 3, 4)
    in_time(lambda: scheduler.run(jobs()))
    assert sorted(done) == list(range(200))
    assert most <= 2 * 3


def test_workers_have_different_numbers_and_work_at_the_same_time() -> None:
    """Every worker waits for the others in its span: a barrier that fewer could not pass."""
    workers = 4
    barrier = threading.Barrier(workers, timeout=HANGS)
    seen: set[int] = set()

    def walk(worker: int, *_: Any) -> None:
        barrier.wait()
        seen.add(worker)

    scheduler: Scheduler[int] = Scheduler(walk, workers, 1)
    in_time(lambda: scheduler.run(iter([Job(None, procedure(1, []), workers)])))
    assert seen == set(range(workers))


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("failing", [0, 1, 57, 99])
def test_a_failure_comes_out_and_nothing_new_begins(workers: int, failing: int) -> None:
    """Each worker may be in one span when it happens; none takes another."""
    after = 0
    failed = threading.Event()

    def walk(worker: int, owner: int, *_: Any) -> None:
        nonlocal after
        del worker
        if failed.is_set() and scheduler.stopping:
            after += 1
        if owner == failing:
            failed.set()
            raise Broken(owner)

    scheduler: Scheduler[int] = Scheduler(walk, workers, 1)
    begun = 0

    def jobs() -> Iterator[Job[int]]:
        nonlocal begun
        for number in range(100_000):
            begun += 1
            yield Job(number, procedure(1, []), 1)

    with pytest.raises(Broken) as caught:
        in_time(lambda: scheduler.run(jobs()))
    assert caught.value.args == (failing,)
    assert scheduler.stopping
    assert begun < 100_000
    assert after <= workers


def test_workers_in_the_middle_of_a_span_can_see_the_failure() -> None:
    """The others walk a span without end, until ``stopping`` says that it is vain."""
    everyone = threading.Barrier(3, timeout=HANGS)

    def walk(worker: int, owner: int, *_: Any) -> None:
        del worker
        everyone.wait()
        if owner == 1:
            raise Broken
        while not scheduler.stopping:
            threading.Event().wait(0.001)

    scheduler: Scheduler[int] = Scheduler(walk, 3, 1)
    with pytest.raises(Broken):
        in_time(lambda: scheduler.run(Job(number, procedure(1, []), 1) for number in range(3)))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("worker ")]


def test_workers_that_wait_are_woken_by_a_failure() -> None:
    """One span, many workers: all but one have nothing to do but wait for the next pass."""

    def walk(worker: int, owner: Any, pass_: int, *_: Any) -> None:
        del worker, owner
        if pass_ == 1:
            raise Broken

    scheduler: Scheduler[int] = Scheduler(walk, 6, 10)
    with pytest.raises(Broken):
        in_time(lambda: scheduler.run(iter([Job(None, procedure(2, []), 10)])))


def test_the_first_of_several_failures_comes_out() -> None:
    together = threading.Barrier(4, timeout=HANGS)

    def walk(worker: int, *_: Any) -> None:
        together.wait()
        raise Broken(worker)

    scheduler: Scheduler[int] = Scheduler(walk, 4, 1)
    with pytest.raises(Broken):
        in_time(lambda: scheduler.run(iter([Job(None, procedure(1, []), 4)])))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_failing_procedure_comes_out(workers: int, after: int) -> None:
    def failing() -> Generator[int, list[Any], None]:
        yield from procedure(after, [])
        raise Broken

    scheduler: Scheduler[int] = Scheduler(lambda *_: None, workers, 1)
    with pytest.raises(Broken):
        in_time(lambda: scheduler.run(iter([Job(None, procedure(3, []), 5), Job(None, failing(), 5)])))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_failing_iterator_of_jobs_comes_out(workers: int) -> None:
    def jobs() -> Iterator[Job[int]]:
        yield Job(None, procedure(2, []), 3)
        raise Broken

    scheduler: Scheduler[int] = Scheduler(lambda *_: None, workers, 1)
    with pytest.raises(Broken):
        in_time(lambda: scheduler.run(jobs()))


def test_an_interrupt_of_a_worker_comes_out_too() -> None:
    def walk(*_: Any) -> None:
        raise KeyboardInterrupt

    scheduler: Scheduler[int] = Scheduler(walk, 2, 1)
    with pytest.raises(KeyboardInterrupt):
        in_time(lambda: scheduler.run(iter([Job(None, procedure(1, []), 9)])))


@pytest.mark.parametrize("times", [1, 2, 5])
def test_no_interruption_leaves_workers_behind(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Ctrl-C while it waits for the workers, and again while they end."""
    join, left = threading.Thread.join, times
    interrupted = threading.Event()

    def interrupting(thread: threading.Thread, timeout: float | None = None) -> None:
        nonlocal left
        if thread.name.startswith("worker ") and left:
            left -= 1
            if not left:
                interrupted.set()
            raise KeyboardInterrupt
        join(thread, timeout)

    def walk(*_: Any) -> None:
        assert interrupted.wait(HANGS)

    monkeypatch.setattr(threading.Thread, "join", interrupting)
    scheduler: Scheduler[int] = Scheduler(walk, 3, 1)
    with pytest.raises(KeyboardInterrupt):
        in_time(lambda: scheduler.run(iter([Job(None, procedure(1, []), 9)])))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("worker ")]


@pytest.mark.parametrize("available", [0, 1, 3])
def test_fewer_threads_do_the_same_work(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    """The system may give no more; the thread that asks is a worker itself if it gives none."""
    start, started = threading.Thread.start, 0

    def refusing(thread: threading.Thread) -> None:
        nonlocal started
        if thread.name.startswith("worker "):
            if started == available:
                raise RuntimeError("can't start new thread")
            started += 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refusing)
    log: list[list[Any]] = []
    scheduler: Scheduler[int] = Scheduler(lambda _, owner, pass_, first, count: (pass_, first), 5, 10)
    in_time(lambda: scheduler.run(iter([Job(None, procedure(2, log), 95)])))
    assert log == [[(pass_, first) for first in range(0, 95, 10)] for pass_ in range(2)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("worker ")]


class Folded:
    """A pass whose spans' findings are added up."""

    def __init__(self) -> None:
        self.most = 0
        self._alive = 0
        self._lock = threading.Lock()

    def begin(self, found: int) -> int:
        with self._lock:
            self._alive += 1
            self.most = max(self.most, self._alive)
        return found

    def fold(self, one: int, other: int) -> int:
        with self._lock:
            self._alive -= 1
        return one + other


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 7, 500])
def test_what_spans_find_is_folded_as_it_comes(workers: int, size: int) -> None:
    """Two a worker at most, its own and one that it adds to it, and one that waits: never one a span."""
    pass_ = Folded()
    sent = []

    def procedure() -> Generator[Folded, list[int], None]:
        sent.append((yield pass_))

    scheduler: Scheduler[Folded] = Scheduler(
        lambda worker, owner, pass_, first, count: pass_.begin(sum(range(first, first + count))), workers, 1
    )
    scheduler.run([Job(None, procedure(), size)])
    assert sent == [[sum(range(size))]]
    assert pass_.most <= 2 * workers + 1
