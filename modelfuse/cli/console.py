"""Output of text: styled and wrapped on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from modelfuse.printable import one_line, printable

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from rich.text import Text

#: rich's style tags, which are removed from logs.
STYLES = re.compile(r"\[[a-z /]+\]")
#: Environment variables that make rich treat any stream as a terminal.
FORCED = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
#: For each kind of message, its styled prefix, and its level in logs with times.
KINDS = {
    "error": ("[bold red]error:[/] ", "ERROR"),
    "hint": ("[bold]hint:[/] ", "ERROR"),
    "problem": ("[bold red]problem:[/] ", "ERROR"),
    "warning": ("[bold yellow]warning:[/] ", "WARNING"),
    "note": ("[yellow]note:[/] ", "WARNING"),
    "info": ("", "INFO"),
    "progress": ("", "INFO"),
    "debug": ("", "DEBUG"),
}


class TextStream:
    """Writes lines and tables to a stream; rich is imported only for a terminal.

    Args:
        stream: ``stdout`` or ``stderr``.
        fails: Whether errors of writing are raised, such as a full disk; else they are ignored.
    """

    def __init__(self, stream: str, fails: bool = True) -> None:
        self._stream, self._fails = stream, fails
        #: Called with the level and text of every logged line; and whether one of them writes to this stream.
        self.logs: list[Callable[[str, str], None]] = []
        self.has_timestamps = False

    @property
    def is_terminal(self) -> bool:
        """Whether the stream is a terminal."""
        forced = any(name in os.environ for name in FORCED)
        return self.console.is_terminal if forced else bool(getattr(sys, self._stream).isatty())

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None for a log, whose lines are not limited."""
        return self.console.width if self.is_terminal else None

    @property
    def shows_bars(self) -> bool:
        """Whether to show progress bars: on a terminal and in a notebook, unless lines with times are written there."""
        return not self.has_timestamps and (self.is_terminal or in_notebook())

    @property
    def logs_progress(self) -> bool:
        """Whether to write lines of progress."""
        return bool(self.logs) or not self.shows_bars

    def print(self, text: str, *values: object, wrap: bool = True) -> None:
        """Write one or more lines.

        Args:
            text: A format string with rich's markup.
            values: Values to format, in which markup and control characters are escaped.
            wrap: Whether to wrap lines at spaces on a terminal.
        """
        shown = [printable(value) for value in values]
        if self.is_terminal:
            from rich.markup import escape
            from rich.text import Text

            marked = Text.from_markup(text.format(*map(escape, shown)))
            for line in marked.split(allow_blank=True):
                for part in _wrapped(line, self.console.width) if wrap else [line]:
                    self._print(part)
            return
        with suppress(*() if self._fails else (OSError,)):
            print(STYLES.sub("", text).format(*shown), file=getattr(sys, self._stream))

    def log(self, kind: str, text: str, *values: object) -> None:
        """Write a message of one of ``KINDS``, also to the logs."""
        prefix, level = KINDS[kind]
        for log in self.logs:
            plain = STYLES.sub("", text).format(*map(printable, values))
            log(level, f"{kind}: {plain}" if kind == "hint" else plain)
        if not (self.has_timestamps or kind == "debug" or (kind == "progress" and self.shows_bars)):
            self.print(prefix + text, *values)

    def command(self, text: str) -> None:
        """Write a command to copy, on a line of its own."""
        self.print("  [bold]{}[/]", text, wrap=False)

    def table(self, titles: Sequence[str], rows: Iterable[Sequence[object]], head: int = 1) -> None:
        """Write a table; if it is wider than the terminal, each row takes several lines.

        Args:
            titles: The titles of the columns.
            rows: The cells of each row.
            head: The number of leading columns that identify a row, which are its first line in a narrow terminal.
        """
        texts = [[one_line(cell) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(titles, *texts, strict=True)]
        if self.width is None or sum(widths) + 2 * len(widths) - 2 <= self.width:
            for number, row in enumerate([list(titles), *texts]):
                line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
                self.print("{}" if number else "[bold]{}[/]", line.rstrip(), wrap=False)
            return
        for row in texts:
            self.print("[bold]{}[/]", " ".join(filter(None, row[:head])), wrap=False)
            rest = zip(titles[head:], row[head:], strict=True)
            self.print("{}", "  " + ", ".join(f"{title} {cell}" for title, cell in rest if cell))

    def _print(self, *objects: Any, **options: Any) -> None:
        with suppress(*() if self._fails else (OSError,)):
            self.console.print(*objects, **options)

    @cached_property
    def console(self) -> Console:
        """rich's console."""
        from rich.console import Console

        return Console(highlight=False, soft_wrap=True, stderr=self._stream == "stderr")


#: Results of commands.
out = TextStream("stdout")
#: Everything else. A merge does not fail because the disk of its log is full.
err = TextStream("stderr", fails=False)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"


def configure_logs(verbose: bool, path: Path | None) -> None:
    """Configure logs with times and levels, which include messages of kind ``debug``.

    Args:
        verbose: Whether to log to standard error, instead of plain lines.
        path: A file to append the messages of both streams to.

    Raises:
        OutputError: If the file cannot be opened.
    """
    out.logs, err.logs, err.has_timestamps = [], [], verbose
    if path is not None or verbose:
        from modelfuse.cli.logs import log_file, log_stream

        out.logs = [] if path is None else [log_file(path)]
        err.logs = [*out.logs, *([log_stream(sys.stderr)] if verbose else [])]


def _wrapped(line: Text, width: int) -> Iterator[Text]:
    """Split a line at spaces into pieces that fit; the pieces have the line's indentation."""
    indent = len(line.plain) - len(line.plain.lstrip(" "))
    begin = 0
    for end in _breaks(line.plain, width, indent):
        piece = line[begin:end]
        piece.rstrip()
        if begin:
            piece.pad_left(indent)
        yield piece
        begin = end


def _breaks(line: str, width: int, indent: int) -> Iterator[int]:
    """The ends of the pieces of a line, after spaces."""
    begin, column, end = 0, 0, 0
    for word in re.finditer(r" *[^ ]+ *", line):
        if end > begin and column + len(word[0].rstrip()) > width:
            yield end
            begin, column = end, indent
        column += len(word[0])
        end = word.end()
    yield len(line)
