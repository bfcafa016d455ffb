"""Calls of the C library that Python's own modules lack."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable

Call = Callable[..., int]


def find(*names: str) -> Call | None:
    """The first of these functions that the C library has; it may go by another name in another library."""
    library = ctypes.CDLL(None, use_errno=True)
    found: Call | None = next(filter(None, (getattr(library, name, None) for name in names)), None)
    return found


def failure_of(call: Call, *arguments: object) -> int:
    """Make a call, again where a signal interrupts it; returns the number of its error, zero if it is done."""
    failure = errno.EINTR
    while failure == errno.EINTR:
        failure = ctypes.get_errno() if call(*arguments) else 0
    return failure
