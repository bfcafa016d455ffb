"""Show progress: a bar on a terminal or in a notebook, a line every few seconds in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

from modelfuse.cli import console
from modelfuse.cli.console import err
from modelfuse.cli.units import duration, rate
from modelfuse.recipe.sizes import size
from modelfuse.storage import PathOrUrl

if TYPE_CHECKING:
    from modelfuse.planning.diff_plan import DiffPlan
    from modelfuse.planning.hub import FetchDisplay
    from modelfuse.planning.plan import Plan

#: Seconds between lines of progress in a log.
LOG_INTERVAL = 10.0
#: Seconds between updates of a bar in a notebook.
NOTEBOOK_INTERVAL = 0.2
#: The share that must be done before the remaining time is estimated.
LEAST_SHARE = 0.005


Advance = Callable[[int], None]


@contextmanager
def merging(plan: Plan, quiet: bool, of_recipe: bool = False) -> Iterator[Advance]:
    """Show the notes and warnings of a plan, then the progress of the merge.

    Args:
        plan: The plan.
        quiet: Whether to show nothing.
        of_recipe: Whether to show the warnings about the recipe, too. The command line shows them before planning.
    """
    from modelfuse.planning.warnings import warnings_of

    whole, warnings = plan.bytes_read + plan.bytes_written, len(warnings_of(plan.recipe))
    for number, text in enumerate(() if quiet else plan.notes):
        if of_recipe or number >= warnings:
            err.log("note" if number >= warnings else "warning", "{}", text)
    for text in () if quiet else plan.warnings:
        err.log("warning", "{}", text)
    what = f"merging {len(plan.tensors)} tensors of {len(plan.models)} checkpoints, {size(whole)}"
    with _shown("merging", what, quiet, whole) as advance:
        yield lambda count: advance(count, whole)


def verifying(folder: PathOrUrl, quiet: bool) -> AbstractContextManager[Callable[[int, int], None]]:
    """Show the progress of a verification, whose total is known with the first bytes."""
    return _shown("verifying", f"verifying {folder}", quiet)


def comparing(plan: DiffPlan, quiet: bool) -> AbstractContextManager[Callable[[int, int], None]]:
    """Show the progress of a comparison."""
    what = f"comparing {len(plan.tensors)} tensors of {len(plan.models)} checkpoints, {size(plan.bytes_read)}"
    return _shown("comparing", what, quiet, plan.bytes_read)


def fetching(quiet: bool) -> FetchDisplay:
    """Show the progress of fetching from a hub, and notes."""
    from modelfuse.planning.hub import FetchDisplay

    @contextmanager
    def show(whole: int) -> Iterator[Advance]:
        with _shown("fetching", f"fetching {size(whole)}", quiet, whole) as advance:
            yield lambda count: advance(count, whole)

    return FetchDisplay(show, lambda text: err.log("note", "{}", text))


@contextmanager
def _shown(word: str, what: str, quiet: bool, whole: int | None = None) -> Iterator[Callable[[int, int], None]]:
    """Show progress. The context's value is called with the bytes done since the last call, and the total."""
    with ExitStack() as stack:
        shown: list[Callable[[int, int], None]] = []
        if err.shows_bars and not quiet:
            shown.append(stack.enter_context(_notebook_bar(word) if console.in_notebook() else _bar(word, whole)))
        if err.logs_progress and not quiet:
            err.log("progress", "{}", what)
            shown.append(_Lines().advance)

        def advance(count: int, whole: int) -> None:
            for each in shown:
                each(count, whole)

        yield advance


@contextmanager
def _bar(word: str, whole: int | None) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    text = TextColumn("{task.description}")
    columns = (text, BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err.console, transient=True, expand=True) as bar:
        task = bar.add_task(word, total=whole)
        yield lambda count, whole: bar.update(task, advance=count, total=whole)


@contextmanager
def _notebook_bar(word: str) -> Iterator[Callable[[int, int], None]]:
    """A bar in HTML, which needs only IPython."""
    display = import_module("IPython.display")
    lines, lock = _Lines(), threading.Lock()
    handle = display.display(display.HTML(f"{word} …"), display_id=True)
    shown = 0.0

    def advance(count: int, whole: int) -> None:
        nonlocal shown
        with lock:
            text, now = lines.count(count, whole), time.monotonic()
            if now - shown >= NOTEBOOK_INTERVAL:
                shown = now
                bar = f"<progress value={lines.done} max={whole} style='width:40ch'></progress>"
                handle.update(display.HTML(f"{word} {bar} {text}"))

    try:
        yield advance
    finally:
        handle.update(display.HTML(f"{word}: {size(lines.done)} in {duration(time.monotonic() - lines.started)}"))


class _Lines:
    """Counts progress, and writes a line every few seconds."""

    def __init__(self) -> None:
        self.done, self._lock = 0, threading.Lock()
        self.started = self._shown = time.monotonic()
        self._first: int | None = None

    def advance(self, count: int, whole: int) -> None:
        with self._lock:
            text, now = self.count(count, whole), time.monotonic()
            if now - self._shown < LOG_INTERVAL:
                return
            self._shown = now
        err.log("progress", "{}", text)

    def count(self, count: int, whole: int) -> str:
        """Count bytes, and describe the progress; not thread-safe."""
        self.done += count
        if self._first is None:  # The first call may include work of an earlier run, which is left out of the speed.
            self._first, self.started = count, time.monotonic()
        text, fresh = f"{self.done / whole:4.0%}  {size(self.done)}", self.done - self._first
        if fresh > LEAST_SHARE * whole:
            passed = max(time.monotonic() - self.started, 1e-9)
            text += f"  {rate(fresh, passed)}  {(whole - self.done) / fresh * passed:,.0f} s left"
        return text
