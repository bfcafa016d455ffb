"""Handle SIGTERM like Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Terminated(KeyboardInterrupt):
    """Raised in the main thread on SIGTERM."""


@contextmanager
def terminable() -> Iterator[None]:
    """Raise :class:`Terminated` in the block on SIGTERM, and end the process with the signal after the block.

    Nothing is changed if the process handles the signal itself.
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
