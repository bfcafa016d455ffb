"""Threads that are waited for even if the main thread is interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")


def join(threads: Iterable[threading.Thread], interrupted: Callable[[BaseException], None] | None = None) -> None:
    """Wait for threads to end in spite of interruptions: they write to files that are about to be closed.

    Args:
        threads: The threads.
        interrupted: Called with an interruption at once; without it, the last one is raised at the end.
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


def in_threads(start: Callable[[], Callable[[Item], Value]], items: Sequence[Item], workers: int) -> list[Value]:
    """The results of a function for each item, in order, computed by several threads.

    Args:
        start: Called in each thread; gives its function, which may hold memory that no other thread uses.
        items: The items; after an error or an interruption, no further one is begun.
        workers: The number of threads.

    Raises:
        BaseException: The first error of a function, or an interruption.
    """
    found, waiting, failed = dict[int, Value](), iter(enumerate(items)), list[BaseException]()
    lock = threading.Lock()

    def work() -> None:
        try:
            function = start()
            while not failed:
                with lock:
                    number, item = next(waiting, (-1, None))
                if item is None:
                    return
                found[number] = function(item)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, name=f"worker {number}", daemon=True) for number in range(workers)]
    for thread in threads:
        thread.start()
    join(threads, failed.append)
    if failed:
        raise failed[0]
    return [found[number] for number in range(len(items))]
