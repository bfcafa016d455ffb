"""Wait for threads even if the main thread is interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable


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
