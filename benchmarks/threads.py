"""Threads of the plain programs, which use the standard library only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence


def run_all(work: Sequence[Callable[[], None]]) -> None:
    """Run each function in a thread of its own, and wait for all.

    Raises:
        OSError: The first one that a function raised.
    """
    errors: list[OSError] = []

    def run(one: Callable[[], None]) -> None:
        try:
            one()
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
