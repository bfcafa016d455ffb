"""Errors while an output is written."""

from __future__ import annotations

import errno
from pathlib import Path

from modelfuse.errors import ClusterError, ModelfuseError, OutputError


def cannot_write(error: OSError, path: Path) -> OutputError:
    """The error for a file of the output that could not be written."""
    hint = "Free some space and merge again." if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
    return OutputError(f"{path} cannot be written: {error.strerror}", hint)


def is_worth_going_on(error: BaseException) -> bool:
    """Whether the same request may succeed later: after an interruption or a system failure."""
    cause = error.__cause__ if isinstance(error, ModelfuseError) else error
    return isinstance(error, OutputError | ClusterError) or (
        isinstance(cause, KeyboardInterrupt | OSError | MemoryError) and not isinstance(cause, FileNotFoundError)
    )
