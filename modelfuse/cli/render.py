"""What people see: plans, progress, summaries and errors, on a terminal or in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING

from modelfuse.checkpoints.tensor_names import pattern
from modelfuse.cli.console import Voice
from modelfuse.dtypes import DType
from modelfuse.errors import ModelfuseError
from modelfuse.storage import Place

if TYPE_CHECKING:
    from rich.progress import Progress

    from modelfuse.execution.run import Result
    from modelfuse.inspection.verify import Verification
    from modelfuse.planning.hub import Watch
    from modelfuse.planning.plan import Plan


#: A log has no width: names stay whole.
out = Voice("stdout", 160)
#: No merge ends because the disk of its log is full.
err = Voice("stderr", fails=False)
#: Seconds between two lines of progress in a log.
LOG_INTERVAL = 10.0
#: The share that must be done before it tells how long the rest will take.
LEAST_TOLD = 0.005
#: Problems that are listed one by one.
MOST_PROBLEMS = 50


def error(problem: ModelfuseError) -> None:
    """A short message and what to do, on standard error."""
    err.say("[bold red]error:[/] {}", problem.message)
    if problem.hint:
        err.say("[bold]hint:[/] {}", problem.hint)
    _notes(problem)


def interrupted(interruption: KeyboardInterrupt) -> None:
    """After Ctrl-C."""
    kept = getattr(interruption, "__notes__", ())
    err.say("[bold red]interrupted[/]" if kept else "[bold red]interrupted:[/] nothing was written to output_path")
    _notes(interruption)


def note(text: str) -> None:
    """A sentence that the user should read."""
    err.say("note: {}", text)


def _notes(problem: BaseException) -> None:
    for text in getattr(problem, "__notes__", ()):
        note(text)


def bug() -> None:
    """An error that is nobody's mistake but ours."""
    with suppress(OSError):
        err.console.print_exception()
    err.say("[bold red]This is a bug in modelfuse.[/] Please report it with the lines above.")


def _device(plan: Plan) -> str:
    if plan.device.tensor_type == "np":
        return ""
    return f", {plan.device.library} tensors on the {'GPU' if plan.device.gpu else 'CPU'}"


def plan(plan: Plan) -> None:
    """What a merge will do."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # For tables of paths and names, which are never cut: a terminal wraps them itself.
    wide = Console(highlight=False, soft_wrap=True, width=1 << 14)
    recipe, method = plan.recipe, plan.recipe.method
    steps = " → ".join(step for step in (method.sparsify_type, method.merge_type) if step)
    out.print(f"[bold]{recipe.merge_method or steps}[/] ({steps}) of {_count(len(recipe.model_path_list), 'model')}")
    models = Table("model", "format", "tensors", "weight", box=None, pad_edge=False)
    for number, model in enumerate(plan.models):
        is_base = plan.has_base and number == len(plan.models) - 1
        weight = "base" if is_base else "–" if method.merge_type == "slerp" else f"{recipe.weights[number]:.6g}"
        models.add_row(escape(str(recipe.inputs[number])), model.kind, str(len(model)), weight)
    wide.print(models)
    tensors = Table("what", "tensors", "dtype", "shape", "count", box=None, pad_edge=False)
    groups: Counter[tuple[str, str, DType, tuple[int, ...]]] = Counter(
        (tensor.action, pattern(tensor.name), tensor.dtype, tensor.shape) for tensor in plan.tensors
    )
    for (action, name, dtype, shape), count in groups.items():
        tensors.add_row(action, escape(name), str(dtype), str(list(shape)), str(count))
    for tied in plan.tied:
        tensors.add_row("leave out", escape(tied.name), "", escape(f"tied to {tied.other}"), "1")
    wide.print(tensors)
    out.print(
        f"\nreads {size(plan.bytes_read)}, writes {size(plan.bytes_written)} into "
        f"{_count(len(plan.files), 'weight file')}, copies {_count(len(plan.side_files), 'other file')}; "
        f"{_count(plan.workers, 'worker')}, at most about {size(plan.memory)} of memory{_device(plan)}"
    )
    for text in plan.notes:
        out.say("[yellow]note:[/] {}", text)


def no_problems() -> None:
    """After a plan that can be carried out."""
    out.print("[green]no problems found[/]")


@contextmanager
def progress(plan: Plan, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line now and then in a log."""
    whole = plan.bytes_read + plan.bytes_written
    if not quiet and not err.is_terminal:
        for text in plan.notes:
            note(text)
    what = f"merging {len(plan.tensors)} tensors of {len(plan.models)} checkpoints, {size(whole)}"
    with _advancing("merging", what, whole, quiet) as advance:
        yield advance


def watch(quiet: bool) -> Watch:
    """The same of what is fetched from a hub."""
    from modelfuse.planning.hub import Watch

    def fetching(whole: int) -> AbstractContextManager[Callable[[int], None]]:
        return _advancing("fetching", f"fetching {size(whole)}", whole, quiet)

    return Watch(fetching, note)


@contextmanager
def _advancing(word: str, what: str, whole: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    if quiet:
        yield lambda _: None
    elif err.is_terminal:
        with _bar() as bar:
            task = bar.add_task(word, total=whole)
            yield lambda count: bar.advance(task, count)
    else:
        err.say("{}", what)
        yield _Log(whole).advance


def _bar() -> Progress:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err.console, transient=True)


class _Log:
    """A line of progress every few seconds."""

    def __init__(self, whole: int) -> None:
        self.whole, self._done, self._lock = whole, 0, threading.Lock()
        self._started = self._shown = time.monotonic()
        self._first: int | None = None

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if self._first is None:  # What an earlier run has done comes at once, and says nothing of the speed.
                self._first, self._started = count, now
            if now - self._shown < LOG_INTERVAL:
                return
            self._shown = now
        line, fresh = f"{self._done / self.whole:4.0%}  {size(self._done)}", self._done - self._first
        if fresh > LEAST_TOLD * self.whole:
            rate = fresh / max(now - self._started, 1e-9)
            line += f"  {size(int(rate))}/s  {(self.whole - self._done) / rate:,.0f} s left"
        err.say("{}", line)


def result(plan: Plan, result: Result) -> None:
    """The closing summary."""
    rate = (result.bytes_read + result.bytes_written - result.bytes_kept) / result.seconds
    copied = f", copied {result.copied}" if result.copied else ""
    done = f"{result.merged} tensors{copied} in {result.seconds:.1f} s ({rate / 1e9:.1f} GB/s)"
    out.say("[green]merged[/] {} into [bold]{}[/]", done, result.output_path)
    if result.suspicious:
        told = "; ".join(f"{each.path}: {each.summary}" for each in result.suspicious)
        out.say("[yellow]note:[/] {} (listed in merge_report.json)", told)
    folder = _quoted(str(result.output_path))
    if plan.recipe.output_format == "lora":
        base = _quoted(str(plan.reference.path))
        out.say(
            "next: vllm serve {} --enable-lora --lora-modules merged={}   (or peft's from_pretrained)", base, folder
        )
    elif any(file.name == "config.json" for file in plan.side_files):
        if plan.format.layout == "paddle":
            loads = f'from_pretrained({folder!r}, load_checkpoint_format="", convert_from_hf=False)'
            out.say("next: {} of PaddleFormers   (modelfuse verify {} checks it)", loads, folder)
            return
        server = "any server that reads safetensors"
        out.say("next: vllm serve {}   (or {}; modelfuse verify {} checks it)", folder, server, folder)


@contextmanager
def verifying(folder: Place, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, a line now and then in a log; how much there is to do is known with the first bytes."""
    if quiet:
        yield lambda _count, _whole: None
    elif err.is_terminal:
        with _bar() as bar:
            task = bar.add_task("verifying", total=None)
            yield lambda count, whole: bar.update(task, advance=count, total=whole)
    else:
        err.say("verifying {}", folder)
        log = _Log(1)

        def advance(count: int, whole: int) -> None:
            log.whole = whole
            log.advance(count)

        yield advance


def verification(found: Verification, quiet: bool) -> None:
    """Every problem on standard error, or what holds."""
    for problem in found.problems[:MOST_PROBLEMS]:
        err.say("[bold red]problem:[/] {}", problem.message)
    if len(found.problems) > MOST_PROBLEMS:
        err.say("[bold red]problem:[/] and {} more", len(found.problems) - MOST_PROBLEMS)
    if not found.holds:
        err.say("[bold red]not verified:[/] {} in [bold]{}[/]", _count(len(found.problems), "problem"), found.path)
    elif not quiet:
        rate = found.nbytes / found.seconds
        number = "all" if found.recomputed == found.tensors else f"{found.recomputed} of them (seed {found.seed})"
        again = f"; {number} merged again, with the same bytes" if not found.absent else ""
        done = f"{_count(found.tensors, 'tensor')} in {found.seconds:.1f} s ({rate / 1e9:.1f} GB/s)"
        out.say("[green]verified[/] {} in [bold]{}[/]: every checksum holds{}", done, found.path, again)
        for absent in found.absent:
            out.say("[yellow]note:[/] nothing was merged again: {}", absent)


def _quoted(path: str) -> str:
    import shlex

    return shlex.quote(path)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def size(count: int) -> str:
    """So many bytes, for people to read."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} bytes"


if sys.platform == "win32":  # pragma: no cover
    raise ImportError("modelfuse needs positioned reads and file locks, which Windows does not have")
