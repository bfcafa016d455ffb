"""How things are said: with styles on a terminal, plainly in a log."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

#: What gives rich's markup its style; a log does without.
STYLES = re.compile(r"\[[a-z /]+\]")
#: What has rich take a log for a terminal.
FORCED = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


class Voice:
    """What is said on one stream: with rich's styles on a terminal; plainly in a log, for which rich is not loaded.

    Args:
        stream: ``stdout`` or ``stderr``.
        log_width: How wide a log is taken to be.
        fails: Whether it is an error that nothing can be said, as when the disk of a log is full.
    """

    def __init__(self, stream: str, log_width: int | None = None, fails: bool = True) -> None:
        self._stream, self._log_width, self._fails = stream, log_width, fails

    @property
    def is_terminal(self) -> bool:
        """Whether someone sees it at once."""
        forced = any(name in os.environ for name in FORCED)
        return self.console.is_terminal if forced else bool(getattr(sys, self._stream).isatty())

    def say(self, text: str, *words: object) -> None:
        """A line.

        Args:
            text: With rich's markup, and with braces for the words.
            words: Without markup, whatever they look like.
        """
        if self.is_terminal:
            from rich.markup import escape

            self.print(text.format(*(escape(str(word)) for word in words)))
            return
        with suppress(*() if self._fails else (OSError,)):
            print(STYLES.sub("", text).format(*words), file=getattr(sys, self._stream))

    def print(self, *objects: Any, **options: Any) -> None:
        """Whatever rich can print."""
        with suppress(*() if self._fails else (OSError,)):
            self.console.print(*objects, **options)

    @cached_property
    def console(self) -> Console:
        """rich's console."""
        from rich.console import Console

        width = None if getattr(sys, self._stream).isatty() else self._log_width
        return Console(highlight=False, soft_wrap=True, stderr=self._stream == "stderr", width=width)
