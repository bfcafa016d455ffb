"""Print plans, summaries and errors."""

from __future__ import annotations

import platform
import traceback
from typing import TYPE_CHECKING

from modelfuse.checkpoints.made_files import REPORT_NAME
from modelfuse.cli.console import TextStream, err, out
from modelfuse.cli.units import counted, duration, rate
from modelfuse.errors import ModelfuseError
from modelfuse.planning.tables import models_of, rules_of, tensors_of
from modelfuse.planning.warnings import warnings_of
from modelfuse.printable import PrintableText
from modelfuse.recipe.sizes import size
from modelfuse.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from modelfuse.execution.result import Result
    from modelfuse.inspection.verify import Verification
    from modelfuse.planning.hub.upload import Pushed
    from modelfuse.planning.plan import Plan
    from modelfuse.recipe.recipe import Recipe

#: The most problems that are printed one by one.
MOST_PROBLEMS = 50


def error(problem: ModelfuseError) -> None:
    """Print an error's message, hint and notes to standard error."""
    err.log("error", "{}", problem.message)
    if problem.hint:
        err.log("hint", "{}", problem.hint)
    _notes(problem)


def interrupted(interruption: KeyboardInterrupt) -> None:
    """Print a message after Ctrl-C or SIGTERM."""
    kept = getattr(interruption, "__notes__", ())
    what = "[bold red]interrupted[/]" if kept else "[bold red]interrupted:[/] nothing was written to output_path"
    err.log("info", what)
    _notes(interruption)


def details(recipe: Recipe) -> None:
    """Log versions and settings, if there are logs."""
    if not err.logs:
        return  # platform.platform() may run a command.
    err.log("debug", "modelfuse {}, Python {}, {}", __version__, platform.python_version(), platform.platform())
    for name, value in recipe.effective().items():
        err.log("debug", "{} = {}", name, value)


def warnings(recipe: Recipe, stream: TextStream) -> None:
    """Print the warnings about a recipe."""
    for text in warnings_of(recipe):
        stream.log("warning", "{}", text)


def note(text: str) -> None:
    """Print a note."""
    err.log("note", "{}", text)


def notes_unless(quiet: bool) -> Callable[[str], None]:
    """The function that prints notes, or one that ignores them if ``quiet``."""
    return (lambda _: None) if quiet else note


def _notes(problem: BaseException) -> None:
    for text in getattr(problem, "__notes__", ()):
        note(text)


def bug() -> None:
    """Report an unexpected exception (a bug)."""
    err.print("{}", PrintableText.of(traceback.format_exc().splitlines()))
    err.print("[bold red]This is a bug in modelfuse.[/] Please report it with the lines above.")


def _device(plan: Plan) -> str:
    if plan.device.tensor_type == "np":
        return ""
    return f", {plan.device.library} tensors on the {'GPU' if plan.device.gpu else 'CPU'}"


def plan(plan: Plan) -> None:
    """Print a plan."""
    recipe = plan.recipe
    models = counted(len(recipe.model_path_list), "model")
    if recipe.mergekit is not None:
        out.print("[bold]{}[/], by a mergekit configuration, of {}", recipe.method_told[0], models)
    else:
        steps = " → ".join(step for step in recipe.parameters.steps if step)
        out.print("[bold]{}[/] ({}) of {}", recipe.parameters.name, steps, models)
    out.table(*models_of(plan))
    if recipe.rules:
        out.table(*rules_of(plan))
    out.table(*tensors_of(plan), head=2)
    out.print(
        "\nreads {}, writes {} into {}, copies {}; {}, at most about {} of memory{}",
        size(plan.bytes_read),
        size(plan.bytes_written),
        counted(len(plan.files), "weight file"),
        counted(len(plan.side_files), "other file"),
        counted(plan.workers, "worker"),
        size(plan.memory),
        _device(plan),
    )
    if (found := plan.expected) is not None:
        side = f"{found.largest:,}²"
        out.print("about {}: {} of up to {}", duration(found.seconds), counted(found.solved, "decomposition"), side)
    for text in plan.notes[len(warnings_of(recipe)) :]:
        out.log("note", "{}", text)
    for text in plan.warnings:
        out.log("warning", "{}", text)


def checked(plan: Plan) -> None:
    """Print the conclusion of ``check``, if the plan has no errors."""
    if count := len(plan.warnings):
        out.print("[yellow]can be merged, with {}[/]", counted(count, "warning"))
    else:
        out.print("[green]no problems found[/]")


def result(plan: Plan, result: Result) -> None:
    """Print the summary of a merge, and the next steps."""
    from modelfuse.cli.next_step import next_steps

    speed = rate(result.bytes_read + result.bytes_written - result.bytes_kept, result.seconds)
    copied = f", copied {result.copied}" if result.copied else ""
    done = f"{counted(result.merged, 'tensor')}{copied} in {duration(result.seconds)} ({speed})"
    out.log("info", "[green]merged[/] {} into [bold]{}[/]", done, result.output_path)
    for each in result.suspicious:
        out.log("note", "{}: {} (listed in {})", each.path, each.summary, REPORT_NAME)
    out.print("next:")
    for command in next_steps(plan):
        out.command(command)


def pushed(pushed: Pushed) -> None:
    """Print the URL of an uploaded output."""
    seen = "private" if pushed.private else "public"
    out.log("info", "[green]pushed[/] to {}, {}, commit {}", pushed.url, seen, pushed.commit)


def demo(folder: Path, commands: Sequence[str]) -> None:
    """Print the commands to try on the demo's models."""
    out.print("[green]wrote[/] a base, three fine-tunes of it and an adapter, tiny and random, to [bold]{}[/]", folder)
    out.print("try these commands in order:")
    for command in commands:
        out.command(command)


def verification(found: Verification, quiet: bool) -> None:
    """Print the problems to standard error, or the summary if there are none."""
    for problem in found.problems[:MOST_PROBLEMS]:
        err.log("problem", "{}", problem.message)
    if len(found.problems) > MOST_PROBLEMS:
        err.log("problem", "and {} more", len(found.problems) - MOST_PROBLEMS)
    if not found.holds:
        err.log(
            "info", "[bold red]not verified:[/] {} in [bold]{}[/]", counted(len(found.problems), "problem"), found.path
        )
    elif not quiet:
        number = "all" if found.recomputed == found.tensors else f"{found.recomputed} of them (seed {found.seed})"
        again = f"; {number} merged again, with the same bytes" if not found.absent else ""
        done = f"{counted(found.tensors, 'tensor')} in {duration(found.seconds)} ({rate(found.nbytes, found.seconds)})"
        out.log("info", "[green]verified[/] {} in [bold]{}[/]: every checksum holds{}", done, found.path, again)
        for absent in found.absent:
            out.log("note", "nothing was merged again: {}", absent)
