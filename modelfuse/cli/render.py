"""What people see: plans, summaries and errors, on a terminal or in a log."""

from __future__ import annotations

import platform
import traceback
from typing import TYPE_CHECKING

from modelfuse.checkpoints.made_files import REPORT_NAME
from modelfuse.cli.console import Voice, err, out
from modelfuse.cli.units import counted, duration, rate
from modelfuse.errors import ModelfuseError
from modelfuse.planning.tables import models_of, rules_of, tensors_of
from modelfuse.planning.warnings import warnings_of
from modelfuse.printable import Lines
from modelfuse.recipe.sizes import size
from modelfuse.version import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from modelfuse.execution.result import Result
    from modelfuse.inspection.verify import Verification
    from modelfuse.planning.hub.upload import Pushed
    from modelfuse.planning.plan import Plan
    from modelfuse.recipe.recipe import Recipe

#: Problems that are listed one by one.
MOST_PROBLEMS = 50


def error(problem: ModelfuseError) -> None:
    """A short message and what to do, on standard error."""
    err.tell("error", "{}", problem.message)
    if problem.hint:
        err.tell("hint", "{}", problem.hint)
    _notes(problem)


def interrupted(interruption: KeyboardInterrupt) -> None:
    """After Ctrl-C."""
    kept = getattr(interruption, "__notes__", ())
    what = "[bold red]interrupted[/]" if kept else "[bold red]interrupted:[/] nothing was written to output_path"
    err.tell("info", what)
    _notes(interruption)


def details(recipe: Recipe) -> None:
    """What those who read the log later want to know first."""
    if not err.logs:
        return  # The system is asked by a command.
    err.tell("debug", "modelfuse {}, Python {}, {}", __version__, platform.python_version(), platform.platform())
    for name, value in recipe.effective().items():
        err.tell("debug", "{} = {}", name, value)


def warnings(recipe: Recipe, voice: Voice) -> None:
    """What is allowed, but hardly ever meant."""
    for text in warnings_of(recipe):
        voice.tell("warning", "{}", text)


def note(text: str) -> None:
    """A sentence that the user should read."""
    err.tell("note", "{}", text)


def _notes(problem: BaseException) -> None:
    for text in getattr(problem, "__notes__", ()):
        note(text)


def bug() -> None:
    """Report an unexpected exception (a bug)."""
    err.say("{}", Lines.of(traceback.format_exc().splitlines()))
    err.say("[bold red]This is a bug in modelfuse.[/] Please report it with the lines above.")


def _device(plan: Plan) -> str:
    if plan.device.tensor_type == "np":
        return ""
    return f", {plan.device.library} tensors on the {'GPU' if plan.device.gpu else 'CPU'}"


def plan(plan: Plan) -> None:
    """What a merge will do."""
    recipe = plan.recipe
    models = counted(len(recipe.model_path_list), "model")
    if recipe.mergekit is not None:
        out.say("[bold]{}[/], as mergekit's configuration says, of {}", recipe.method_told[0], models)
    else:
        steps = " → ".join(step for step in recipe.parameters.steps if step)
        out.say("[bold]{}[/] ({}) of {}", recipe.parameters.name, steps, models)
    out.table(*models_of(plan))
    if recipe.rules:
        out.table(*rules_of(plan))
    out.table(*tensors_of(plan), head=2)
    out.say(
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
        out.say("about {}: {} of up to {}", duration(found.seconds), counted(found.solved, "decomposition"), side)
    for text in plan.notes[len(warnings_of(recipe)) :]:
        out.tell("note", "{}", text)
    for text in plan.warnings:
        out.tell("warning", "{}", text)


def checked(plan: Plan) -> None:
    """After a plan that can be carried out."""
    if count := len(plan.warnings):
        out.say("[yellow]can be merged, with {}[/]", counted(count, "warning"))
    else:
        out.say("[green]no problems found[/]")


def result(plan: Plan, result: Result) -> None:
    """The closing summary."""
    from modelfuse.cli.next_step import next_steps

    speed = rate(result.bytes_read + result.bytes_written - result.bytes_kept, result.seconds)
    copied = f", copied {result.copied}" if result.copied else ""
    done = f"{counted(result.merged, 'tensor')}{copied} in {duration(result.seconds)} ({speed})"
    out.tell("info", "[green]merged[/] {} into [bold]{}[/]", done, result.output_path)
    for each in result.suspicious:
        out.tell("note", "{}: {} (listed in {})", each.path, each.summary, REPORT_NAME)
    out.say("next:")
    for command in next_steps(plan):
        out.command(command)


def pushed(pushed: Pushed) -> None:
    """Where an output is on a hub."""
    seen = "private" if pushed.private else "public"
    out.tell("info", "[green]pushed[/] to {}, {}, at commit {}", pushed.url, seen, pushed.commit)


def demo(folder: Path, commands: Sequence[str]) -> None:
    """What there is to try, on what."""
    out.say("[green]made[/] a base, three fine-tunes of it and an adapter in [bold]{}[/], tiny and random", folder)
    out.say("try, in this order:")
    for command in commands:
        out.command(command)


def verification(found: Verification, quiet: bool) -> None:
    """Every problem on standard error, or what holds."""
    for problem in found.problems[:MOST_PROBLEMS]:
        err.tell("problem", "{}", problem.message)
    if len(found.problems) > MOST_PROBLEMS:
        err.tell("problem", "and {} more", len(found.problems) - MOST_PROBLEMS)
    if not found.holds:
        err.tell(
            "info", "[bold red]not verified:[/] {} in [bold]{}[/]", counted(len(found.problems), "problem"), found.path
        )
    elif not quiet:
        number = "all" if found.recomputed == found.tensors else f"{found.recomputed} of them (seed {found.seed})"
        again = f"; {number} merged again, with the same bytes" if not found.absent else ""
        done = f"{counted(found.tensors, 'tensor')} in {duration(found.seconds)} ({rate(found.nbytes, found.seconds)})"
        out.tell("info", "[green]verified[/] {} in [bold]{}[/]: every checksum holds{}", done, found.path, again)
        for absent in found.absent:
            out.tell("note", "nothing was merged again: {}", absent)
