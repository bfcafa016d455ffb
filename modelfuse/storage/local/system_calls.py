"""Functions of the C library that Python's modules lack."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable

Call = Callable[..., int]


def find(*names: str) -> Call | None:
    """The first of these functions that the C library has; names differ between libraries."""
    library = ctypes.CDLL(None, use_errno=True)
    found: Call | None = next(filter(None, (getattr(library, name, None) for name in names)), None)
    return found


def failure_of(call: Call, *arguments: object) -> int:
    """Make a call, and repeat it if a signal interrupts it; returns the errno, zero on success."""
    failure = errno.EINTR
    while failure == errno.EINTR:
        failure = ctypes.get_errno() if call(*arguments) else 0
    return failure
