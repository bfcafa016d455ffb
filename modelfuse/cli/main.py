"""The command line: words in, a recipe out; what happened, for people to read."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from modelfuse.cli.arguments import VerifyParser, parse
from modelfuse.errors import ModelfuseError, RecipeError
from modelfuse.recipe.checks import nearest
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import Place, place_of
from modelfuse.version import __version__

if TYPE_CHECKING:
    from modelfuse.planning.plan import Plan

COMMANDS = {
    "merge": "Merge models into a new folder.",
    "check": "Show the plan of a merge, from the headers alone.",
    "verify": "Check a merged model: every checksum, and a sample merged again from the inputs.",
    "methods": "Show the methods, their settings, formulas and papers.",
}
USAGE = "modelfuse {merge,check,verify,methods} [recipe.json|recipe.yaml] [--setting value ...]"
VERIFY_USAGE = "modelfuse verify folder [--full] [--sample N] [--n_process N] [--seed N] [--quiet]"


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 done, 2 the request or an input is wrong, 1 anything else, 130 interrupted.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # Closed by the caller, and its number would be given to the next file.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    from modelfuse.cli import render

    gc.freeze()
    gc.enable()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # Any path and formula can be shown anywhere.
    try:
        status = _run(list(sys.argv[1:] if words is None else words))
        sys.stdout.flush()
        return status
    except ModelfuseError as error:
        render.error(error)
        return 2
    except KeyboardInterrupt as interruption:
        render.interrupted(interruption)
        return 130
    except OSError as error:
        _tell_failure(error)
        return 1
    except MemoryError as error:
        render.error(
            _as_told(error, f"There is not enough memory: {error}", "Give a smaller --memory, or fewer --n_process.")
        )
        return 1
    except Exception:
        render.bug()
        return 1


def _tell_failure(error: OSError) -> None:
    """Tell of what the system could not do, and nobody is to blame for: a failing disk, or a full one."""
    from modelfuse.cli import render

    place = error.filename
    if not isinstance(place, str | bytes):
        # Only printing fails without the name of a file. What could not be written would be tried again at the end.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return  # Whoever reads it, such as `head`, has seen enough.
        place = "standard output"
    render.error(_as_told(error, f"{os.fsdecode(place)}: {error.strerror or error}"))


def _as_told(error: BaseException, message: str, hint: str | None = None) -> ModelfuseError:
    """Another message for an error, with what else is known of it."""
    told = ModelfuseError(message, hint)
    for note in getattr(error, "__notes__", ()):
        told.add_note(note)
    return told


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        from modelfuse.cli import help as help_pages

        help_pages.usage(USAGE, COMMANDS)
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"modelfuse {__version__}")
        return 0
    command = words.pop(0)
    if command not in COMMANDS:
        raise RecipeError(f"There is no command {command!r}", nearest(command, COMMANDS))
    if "-h" in words or "--help" in words:
        from modelfuse.cli import help as help_pages

        if command == "verify":
            help_pages.verify_help(VERIFY_USAGE, COMMANDS[command])
        else:
            help_pages.help_page(USAGE, COMMANDS[command], command)
        return 0
    if command == "verify":
        return _verify(words)
    if command == "methods":
        if words:
            raise RecipeError(
                f"methods takes nothing, but {words[0]!r} is given", "`modelfuse methods` shows them all."
            )
        from modelfuse.cli import help as help_pages

        help_pages.methods()
        return 0
    settings, quiet = parse(words)
    recipe = Recipe.parse(settings)
    return _check(recipe, quiet) if command == "check" else _merge(recipe, quiet)


def _check(recipe: Recipe, quiet: bool) -> int:
    from modelfuse.cli import render
    from modelfuse.planning.hub import headers
    from modelfuse.planning.output_location import check_room

    with headers(recipe, render.watch(quiet)) as at_hand:
        plan = _plan(at_hand)
    render.plan(plan)
    check_room(plan.recipe.output_path, plan.room)
    render.no_problems()
    return 0


def _plan(recipe: Recipe) -> Plan:
    from modelfuse.planning.plan import make_plan

    gc.disable()  # Nothing in a plan is a cycle; looking for some takes a third of the time.
    try:
        return make_plan(recipe)
    finally:
        gc.enable()


def _merge(recipe: Recipe, quiet: bool) -> int:
    from modelfuse.cli import render

    if recipe.output_path is None:
        raise RecipeError("output_path is not given", "Name the folder to create with --output_path.")
    from modelfuse.planning.hub import fetch

    plan = _plan(fetch(recipe, render.watch(quiet)))
    from modelfuse.execution.run import run_plan

    with render.progress(plan, quiet) as advance:
        result = run_plan(plan, advance, _tell(quiet))
    if not quiet:
        render.result(plan, result)
    return 0


def _tell(quiet: bool) -> Callable[[str], None]:
    """Where to say what the user may wonder about."""
    from modelfuse.cli import render

    return (lambda _: None) if quiet else render.note


def _verify(words: list[str]) -> int:
    from modelfuse.cli import render
    from modelfuse.inspection.verify import verify_output
    from modelfuse.kernels.jit.compile import announcing

    parser = VerifyParser(add_help=False, allow_abbrev=False)
    parser.add_argument("folder")
    for flag in ("--full", "--quiet"):
        parser.add_argument(flag, action="store_true")
    for setting in ("--sample", "--n_process", "--seed"):
        parser.add_argument(setting, type=int)
    plain = (f"--{word[2:].replace('-', '_')}" if word.startswith("--") else word for word in words)
    given = vars(parser.parse_args(list(plain)))
    quiet, folder = given.pop("quiet"), _place(given.pop("folder"))
    with render.verifying(folder, quiet) as progress, announcing(_tell(quiet)):
        found = verify_output(folder, **given, progress=progress)
    render.verification(found, quiet)
    return 0 if found.holds else 2


def _place(word: str) -> Place:
    try:
        return place_of(word)
    except ValueError as error:
        raise RecipeError(f"{word}: {error}", VERIFY_USAGE) from None
