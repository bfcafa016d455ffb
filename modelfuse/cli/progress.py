"""How far work has come: a bar on a terminal or in a notebook, a line now and then in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

from modelfuse.cli.console import err
from modelfuse.cli.units import rate
from modelfuse.recipe.sizes import size
from modelfuse.storage import Place

if TYPE_CHECKING:
    from modelfuse.planning.hub import Watch
    from modelfuse.planning.plan import Plan

#: Seconds between two lines of progress in a log.
LOG_INTERVAL = 10.0
#: The share that must be done before it tells how long the rest will take.
LEAST_TOLD = 0.005


Advance = Callable[[int], None]


@contextmanager
def merging(plan: Plan, quiet: bool) -> Iterator[Advance]:
    """Show a merge; what the user should know of it comes first."""
    from modelfuse.planning.warnings import warnings_of

    whole = plan.bytes_read + plan.bytes_written
    if not quiet:
        for text in plan.notes[len(warnings_of(plan.recipe)) :]:  # Those were shown before the plan was made.
            err.tell("note", "{}", text)
        for text in plan.warnings:
            err.tell("warning", "{}", text)
    what = f"merging {len(plan.tensors)} tensors of {len(plan.models)} checkpoints, {size(whole)}"
    with _shown("merging", what, quiet) as advance:
        yield lambda count: advance(count, whole)


def verifying(folder: Place, quiet: bool) -> AbstractContextManager[Callable[[int, int], None]]:
    """Show a verification; how much there is to do is known with the first bytes."""
    return _shown("verifying", f"verifying {folder}", quiet)


def watch(quiet: bool) -> Watch:
    """Show what is fetched from a hub."""
    from modelfuse.planning.hub import Watch

    @contextmanager
    def fetching(whole: int) -> Iterator[Advance]:
        with _shown("fetching", f"fetching {size(whole)}", quiet) as advance:
            yield lambda count: advance(count, whole)

    return Watch(fetching, lambda text: err.tell("note", "{}", text))


@contextmanager
def _shown(word: str, what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Called with bytes that are done since the last call, and all there are to do."""
    with ExitStack() as stack:
        shown: list[Callable[[int, int], None]] = []
        if err.shows_bars and not quiet:
            shown.append(stack.enter_context(_bar(word)))
        if err.keeps_lines and not quiet:
            err.tell("progress", "{}", what)
            shown.append(_Lines().advance)

        def advance(count: int, whole: int) -> None:
            for each in shown:
                each(count, whole)

        yield advance


@contextmanager
def _bar(word: str) -> Iterator[Callable[[int, int], None]]:
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
        task = bar.add_task(word, total=None)
        yield lambda count, whole: bar.update(task, advance=count, total=whole)


class _Lines:
    """A line of progress every few seconds."""

    def __init__(self) -> None:
        self._done, self._lock = 0, threading.Lock()
        self._started = self._shown = time.monotonic()
        self._first: int | None = None

    def advance(self, count: int, whole: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if self._first is None:  # What an earlier run has done comes at once, and says nothing of the speed.
                self._first, self._started = count, now
            if now - self._shown < LOG_INTERVAL:
                return
            self._shown = now
        line, fresh = f"{self._done / whole:4.0%}  {size(self._done)}", self._done - self._first
        if fresh > LEAST_TOLD * whole:
            passed = max(now - self._started, 1e-9)
            line += f"  {rate(fresh, passed)}  {(whole - self._done) / fresh * passed:,.0f} s left"
        err.tell("progress", "{}", line)
