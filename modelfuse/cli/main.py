"""The command line: words in, a recipe out; what happened, for people to read."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from modelfuse.cli import console
from modelfuse.cli.arguments import Options, parse, parse_verify
from modelfuse.errors import ModelfuseError, RecipeError
from modelfuse.recipe.checks import closest
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import Place, place_of
from modelfuse.version import __version__

if TYPE_CHECKING:
    from modelfuse.planning.plan import Plan


def main(words: Sequence[str] | None = None, **defaults: object) -> int:
    """Run the command line.

    Args:
        words: Of the command; those of this process if None.
        defaults: What settings are where neither a flag nor a recipe says anything.

    Returns:
        The exit status: 0 done, 2 the request or an input is wrong, 1 anything else, 130 interrupted.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # Closed by the caller, and its number would be given to the next file.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    from modelfuse.cli import render

    console.begin_logs(False, None)
    gc.freeze()
    gc.enable()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # Any path and formula can be shown anywhere.
    try:
        status = _run(list(sys.argv[1:] if words is None else words), defaults)
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


def _run(words: list[str], defaults: Mapping[str, object]) -> int:
    command = words.pop(0) if words else ""
    if command in ("-V", "--version"):
        print(f"modelfuse {__version__}")
        return 0
    if command in ("", "-h", "--help", "help"):
        return _help(words) if command else _help([]) or 2
    if command not in COMMANDS:
        raise RecipeError(f"There is no command {command!r}", f"{closest(command, COMMANDS)}{LISTED}".lstrip())
    if "-h" in words or "--help" in words:
        return _help([command])
    return COMMANDS[command](words, defaults)


def _help(words: list[str]) -> int:
    from modelfuse.cli import help as help_pages

    if not words:
        help_pages.usage()
    elif words[0] in help_pages.PAGES:
        help_pages.help_page(words[0])
    else:
        raise RecipeError(f"There is no command {words[0]!r}", LISTED)
    return 0


def _check(words: list[str], defaults: Mapping[str, object]) -> int:
    from modelfuse.cli import progress, render
    from modelfuse.planning.hub import headers
    from modelfuse.planning.output_location import check_room

    settings, options = parse(words, "check", defaults)
    recipe = _begin(settings, options, console.out)
    with headers(recipe, progress.watch(options.quiet)) as at_hand:
        plan = _plan(at_hand)
    render.plan(plan)
    check_room(plan.recipe.output_path, plan.room)
    render.no_problems()
    return 0


def _merge(words: list[str], defaults: Mapping[str, object]) -> int:
    from modelfuse.cli import progress, render

    settings, options = parse(words, "merge", defaults)
    recipe, quiet = _begin(settings, options, console.err), options.quiet
    if recipe.output_path is None:
        raise RecipeError("output_path is not given", "Name the folder to create with --output_path.")
    from modelfuse.planning.hub import fetch

    plan = _plan(fetch(recipe, progress.watch(quiet)))
    from modelfuse.execution.run import run_plan

    with progress.merging(plan, quiet) as advance:
        result = run_plan(plan, advance, _tell(quiet))
    if not quiet:
        render.result(plan, result)
    return 0


def _begin(settings: Mapping[str, object], options: Options, voice: console.Voice) -> Recipe:
    """Speak as was asked for, first of what can be said before anything is read."""
    from modelfuse.cli import render

    console.begin_logs(options.verbose, options.log_file)
    recipe = Recipe.parse(settings)
    render.details(recipe)
    if not options.quiet:
        render.warnings(recipe, voice)
    return recipe


def _verify(words: list[str], _: Mapping[str, object]) -> int:
    from modelfuse.cli import progress, render
    from modelfuse.inspection.verify import verify_output
    from modelfuse.kernels.jit.compile import announcing

    given, options = parse_verify(words)
    console.begin_logs(options.verbose, options.log_file)
    folder = _place(given.pop("folder"))
    with progress.verifying(folder, options.quiet) as advance, announcing(_tell(options.quiet)):
        found = verify_output(folder, **given, progress=advance)
    render.verification(found, options.quiet)
    return 0 if found.holds else 2


def _methods(words: list[str], _: Mapping[str, object]) -> int:
    if words:
        raise RecipeError(f"methods takes nothing, but {words[0]!r} is given", "`modelfuse methods` shows them all.")
    from modelfuse.cli import help as help_pages

    help_pages.methods()
    return 0


def _completion(words: list[str], _: Mapping[str, object]) -> int:
    from modelfuse.cli.completion import SHELLS, script

    if len(words) != 1 or words[0] not in SHELLS:
        raise RecipeError("completion takes the name of a shell", f"Give one of {', '.join(SHELLS)}.")
    print(script(words[0]))
    return 0


#: What each command does with the words behind it, and settings to take where those say nothing.
COMMANDS: dict[str, Callable[[list[str], Mapping[str, object]], int]] = {
    "merge": _merge, "check": _check, "verify": _verify, "methods": _methods, "completion": _completion,
}  # fmt: skip
LISTED = f"The commands are {', '.join(COMMANDS)}; `modelfuse --help` tells more."


def _plan(recipe: Recipe) -> Plan:
    from modelfuse.planning.plan import make_plan

    gc.disable()  # Nothing in a plan is a cycle; looking for some takes a third of the time.
    try:
        return make_plan(recipe)
    finally:
        gc.enable()


def _tell(quiet: bool) -> Callable[[str], None]:
    """Where to say what the user may wonder about."""
    from modelfuse.cli import render

    return (lambda _: None) if quiet else render.note


def _place(word: str) -> Place:
    try:
        return place_of(word)
    except ValueError as error:
        raise RecipeError(f"{word}: {error}", "`modelfuse help verify` tells more.") from None
