"""Text for people: with styles and wrapped at spaces on a terminal, plainly in a log."""

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

#: What gives rich's markup its style; a log does without.
STYLES = re.compile(r"\[[a-z /]+\]")
#: What has rich take a log for a terminal.
FORCED = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
#: What a line begins with that is more than information, its style, and its level in a log with times.
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


class Voice:
    """Lines and tables on one stream; rich is loaded for a terminal only.

    Args:
        stream: ``stdout`` or ``stderr``.
        fails: Whether it is an error that nothing can be written, as when the disk of a log is full.
    """

    def __init__(self, stream: str, fails: bool = True) -> None:
        self._stream, self._fails = stream, fails
        #: What takes the level and text of every line that is told, and whether one of them shows it here.
        self.logs: list[Callable[[str, str], None]] = []
        self.has_times = False

    @property
    def is_terminal(self) -> bool:
        """Whether someone sees it at once."""
        forced = any(name in os.environ for name in FORCED)
        return self.console.is_terminal if forced else bool(getattr(sys, self._stream).isatty())

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None for a log, whose lines have any length."""
        return self.console.width if self.is_terminal else None

    @property
    def shows_bars(self) -> bool:
        """Whether progress is a bar: on a terminal and in a notebook, unless lines with times are wanted there."""
        return not self.has_times and (self.is_terminal or in_notebook())

    @property
    def keeps_lines(self) -> bool:
        """Whether progress is lines, too."""
        return bool(self.logs) or not self.shows_bars

    def say(self, text: str, *words: object, wrap: bool = True) -> None:
        """Write a line, or several.

        Args:
            text: With rich's markup, and with braces for the words.
            words: Without markup and control characters, whatever they look like.
            wrap: Whether a terminal may break it at spaces; a command to copy stays one line.
        """
        shown = [printable(word) for word in words]
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

    def tell(self, kind: str, text: str, *words: object) -> None:
        """Write a line of one of ``KINDS``, to the logs that were begun, too."""
        prefix, level = KINDS[kind]
        for log in self.logs:
            plain = STYLES.sub("", text).format(*map(printable, words))
            log(level, f"{kind}: {plain}" if kind == "hint" else plain)
        if not (self.has_times or kind == "debug" or (kind == "progress" and self.shows_bars)):
            self.say(prefix + text, *words)

    def command(self, text: str) -> None:
        """Write a command to copy, on a line of its own."""
        self.say("  [bold]{}[/]", text, wrap=False)

    def table(self, titles: Sequence[str], rows: Iterable[Sequence[object]], head: int = 1) -> None:
        """Write rows in columns; where they are wider than the terminal, each row in a few lines.

        Args:
            titles: Of the columns.
            rows: Their cells.
            head: How many cells say what a row is about; in lines, these come first.
        """
        texts = [[one_line(cell) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(titles, *texts, strict=True)]
        if self.width is None or sum(widths) + 2 * len(widths) - 2 <= self.width:
            for number, row in enumerate([list(titles), *texts]):
                line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
                self.say("{}" if number else "[bold]{}[/]", line.rstrip(), wrap=False)
            return
        for row in texts:
            self.say("[bold]{}[/]", " ".join(filter(None, row[:head])), wrap=False)
            rest = zip(titles[head:], row[head:], strict=True)
            self.say("{}", "  " + ", ".join(f"{title} {cell}" for title, cell in rest if cell))

    def _print(self, *objects: Any, **options: Any) -> None:
        with suppress(*() if self._fails else (OSError,)):
            self.console.print(*objects, **options)

    @cached_property
    def console(self) -> Console:
        """rich's console."""
        from rich.console import Console

        return Console(highlight=False, soft_wrap=True, stderr=self._stream == "stderr")


#: What was asked for.
out = Voice("stdout")
#: All else. No merge ends because the disk of its log is full.
err = Voice("stderr", fails=False)


def in_notebook() -> bool:
    """Whether output goes to a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"


def begin_logs(verbose: bool, path: Path | None) -> None:
    """From now on, keep the lines that are told with their times and levels, and lines of kind ``debug`` too.

    Args:
        verbose: Whether on standard error, instead of plain lines.
        path: A file to append them to, with those on standard output; None for none.

    Raises:
        OutputError: If the file cannot be opened.
    """
    out.logs, err.logs, err.has_times = [], [], verbose
    if path is not None or verbose:
        from modelfuse.cli.logs import log_file, log_stream

        out.logs = [] if path is None else [log_file(path)]
        err.logs = [*out.logs, *([log_stream(sys.stderr)] if verbose else [])]


def _wrapped(line: Text, width: int) -> Iterator[Text]:
    """A line in pieces that fit, broken at spaces only and indented as it begins: no path or word is torn."""
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
    """Where the pieces of a line end: behind the spaces between two words."""
    begin, column, end = 0, 0, 0
    for word in re.finditer(r" *[^ ]+ *", line):
        if end > begin and column + len(word[0].rstrip()) > width:
            yield end
            begin, column = end, indent
        column += len(word[0])
        end = word.end()
    yield len(line)
