"""SIGTERM ends a command as Ctrl-C does: what is kept is said, and only then the process dies of it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Terminated(KeyboardInterrupt):
    """Raised in the main thread when the process is asked to end."""


@contextmanager
def terminable() -> Iterator[None]:
    """Have SIGTERM raise :class:`Terminated` in the block; at its end, the process dies of the signal.

    Whoever sent it expects that of a process. A process that handles the signal by itself is left alone.
    """
    asked = threading.current_thread() is threading.main_thread()
    if not asked or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    came = False

    def terminate(*_: object) -> None:
        nonlocal came
        came = True
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if came:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            signal.raise_signal(signal.SIGTERM)
