"""The command line: words in, a recipe out; what happened, for people to read."""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from modelfuse.errors import ModelfuseError, RecipeError
from modelfuse.recipe import ANOTHER_WAY, SETTINGS, Recipe, by_canonical_name, canonical_name
from modelfuse.recipe_checks import nearest
from modelfuse.recipe_file import load_recipe
from modelfuse.storage import Place, place_of
from modelfuse.version import __version__

if TYPE_CHECKING:
    from modelfuse.plan import Plan

COMMANDS = {
    "merge": "Merge models into a new folder.",
    "check": "Show the plan of a merge, from the headers alone.",
    "verify": "Check a merged model: every checksum, and a sample merged again from the inputs.",
    "methods": "Show the methods, their settings, formulas and papers.",
}
#: More than any float has before or behind its point.
MOST_DIGITS = 400
USAGE = "modelfuse {merge,check,verify,methods} [recipe.json|recipe.yaml] [--setting value ...]"
VERIFY_USAGE = "modelfuse verify folder [--full] [--sample N] [--n_process N] [--seed N] [--quiet]"


class _Parser(argparse.ArgumentParser):
    command = "merge"

    def error(self, message: str) -> NoReturn:
        raise RecipeError(message[0].upper() + message[1:], f"`modelfuse {self.command} --help` lists every setting.")


class _VerifyParser(_Parser):
    command = "verify"


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 done, 2 the request or an input is wrong, 1 anything else, 130 interrupted.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # Closed by the caller, and its number would be given to the next file.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    from modelfuse import show

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
        show.error(error)
        return 2
    except KeyboardInterrupt as interruption:
        show.interrupted(interruption)
        return 130
    except OSError as error:
        _tell_failure(error)
        return 1
    except MemoryError as error:
        show.error(
            _as_told(error, f"There is not enough memory: {error}", "Give a smaller --memory, or fewer --n_process.")
        )
        return 1
    except Exception:
        show.bug()
        return 1


def _tell_failure(error: OSError) -> None:
    """Tell of what the system could not do, and nobody is to blame for: a failing disk, or a full one."""
    from modelfuse import show

    place = error.filename
    if not isinstance(place, str | bytes):
        # Only printing fails without the name of a file. What could not be written would be tried again at the end.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return  # Whoever reads it, such as `head`, has seen enough.
        place = "standard output"
    show.error(_as_told(error, f"{os.fsdecode(place)}: {error.strerror or error}"))


def _as_told(error: BaseException, message: str, hint: str | None = None) -> ModelfuseError:
    """Another message for an error, with what else is known of it."""
    told = ModelfuseError(message, hint)
    for note in getattr(error, "__notes__", ()):
        told.add_note(note)
    return told


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        from modelfuse import manual

        manual.usage(USAGE, COMMANDS)
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"modelfuse {__version__}")
        return 0
    command = words.pop(0)
    if command not in COMMANDS:
        raise RecipeError(f"There is no command {command!r}", nearest(command, COMMANDS))
    if "-h" in words or "--help" in words:
        from modelfuse import manual

        if command == "verify":
            manual.verify_help(VERIFY_USAGE, COMMANDS[command])
        else:
            manual.help_page(USAGE, COMMANDS[command], command)
        return 0
    if command == "verify":
        return _verify(words)
    if command == "methods":
        if words:
            raise RecipeError(
                f"methods takes nothing, but {words[0]!r} is given", "`modelfuse methods` shows them all."
            )
        from modelfuse import manual

        manual.methods()
        return 0
    settings, quiet = parse(words)
    recipe = Recipe.parse(settings)
    return _check(recipe, quiet) if command == "check" else _merge(recipe, quiet)


def _check(recipe: Recipe, quiet: bool) -> int:
    from modelfuse import show
    from modelfuse.hub import headers
    from modelfuse.places import check_room

    with headers(recipe, show.watch(quiet)) as at_hand:
        plan = _plan(at_hand)
    show.plan(plan)
    check_room(plan.recipe.output_path, plan.room)
    show.no_problems()
    return 0


def _plan(recipe: Recipe) -> Plan:
    from modelfuse.plan import make_plan

    gc.disable()  # Nothing in a plan is a cycle; looking for some takes a third of the time.
    try:
        return make_plan(recipe)
    finally:
        gc.enable()


def _merge(recipe: Recipe, quiet: bool) -> int:
    from modelfuse import show

    if recipe.output_path is None:
        raise RecipeError("output_path is not given", "Name the folder to create with --output_path.")
    from modelfuse.hub import fetch

    plan = _plan(fetch(recipe, show.watch(quiet)))
    from modelfuse.run import run_plan

    with show.progress(plan, quiet) as advance:
        result = run_plan(plan, advance, _tell(quiet))
    if not quiet:
        show.result(plan, result)
    return 0


def _tell(quiet: bool) -> Callable[[str], None]:
    """Where to say what the user may wonder about."""
    from modelfuse import show

    return (lambda _: None) if quiet else show.note


def _verify(words: list[str]) -> int:
    from modelfuse import show
    from modelfuse.kernels.loading import announcing
    from modelfuse.verification import verify_output

    parser = _VerifyParser(add_help=False, allow_abbrev=False)
    parser.add_argument("folder")
    for flag in ("--full", "--quiet"):
        parser.add_argument(flag, action="store_true")
    for setting in ("--sample", "--n_process", "--seed"):
        parser.add_argument(setting, type=int)
    plain = (f"--{word[2:].replace('-', '_')}" if word.startswith("--") else word for word in words)
    given = vars(parser.parse_args(list(plain)))
    quiet, folder = given.pop("quiet"), _place(given.pop("folder"))
    with show.verifying(folder, quiet) as progress, announcing(_tell(quiet)):
        found = verify_output(folder, **given, progress=progress)
    show.verification(found, quiet)
    return 0 if found.holds else 2


def _place(word: str) -> Place:
    try:
        return place_of(word)
    except ValueError as error:
        raise RecipeError(f"{word}: {error}", VERIFY_USAGE) from None


def parse(words: Sequence[str]) -> tuple[dict[str, object], bool]:
    """Turn words into named settings: those of a recipe file, overridden by flags.

    Returns:
        The settings, and whether to be quiet.

    Raises:
        RecipeError: If a flag is unknown or lacks its value, or the recipe cannot be read.
    """
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("recipe", nargs="?", type=Path, default=None)
    parser.add_argument("--quiet", action="store_true")
    for name in ANOTHER_WAY:
        parser.add_argument(f"--{name}")
    for name, setting in SETTINGS.items():
        if setting.is_switch:
            parser.add_argument(f"--{name}", nargs="?", const=True)
        elif setting.takes_several:
            parser.add_argument(f"--{name}", nargs="+")
        else:
            parser.add_argument(f"--{name}")
    given = vars(parser.parse_args(_switched([part for word in words for part in _normal(word)])))
    quiet = bool(given.pop("quiet", False))
    path = given.pop("recipe", None)
    settings = by_canonical_name(load_recipe(path)) if path else {}
    ways = ("model_path_list", *ANOTHER_WAY)
    if any(name in given for name in ways):
        settings = {name: value for name, value in settings.items() if name not in ways}
    return {**settings, **given}, quiet


def _normal(word: str) -> list[str]:
    """A flag with its name as the recipe has it; a negative number as argparse knows it."""
    if word.startswith("--") and len(word) > 2:
        name, equals, value = word[2:].partition("=")
        plain = name.replace("-", "_")
        switched = plain.removeprefix("no_")
        if plain != switched and _is_switch(switched) and not equals:
            return [f"--{switched}", "False"]
        known = plain if plain == "quiet" else canonical_name(name)
        return [f"--{known}", value] if equals else [f"--{known}"]
    if word.startswith("-") and len(word) > 1:
        try:
            number = Decimal(word)
        except InvalidOperation:
            raise RecipeError(f"There is no flag {word}", "Flags begin with two dashes.") from None
        if not number.is_finite() or abs(number.adjusted()) > MOST_DIGITS:
            raise RecipeError(f"{word} is not a number that any setting takes")
        return [format(number, "f")]
    return [word]


def _switched(words: Sequence[str]) -> list[str]:
    """A recipe behind a boolean flag is no value of it: the flag gets its own."""
    done: list[str] = []
    for word in words:
        flag = done[-1].removeprefix("--") if done and done[-1].startswith("--") else ""
        if _is_switch(flag) and _is_recipe(word):
            done.append("True")
        done.append(word)
    return done


def _is_recipe(word: str) -> bool:
    return word.endswith((".json", ".yaml", ".yml")) or os.path.isfile(word)


def _is_switch(name: str) -> bool:
    return name in SETTINGS and SETTINGS[name].is_switch
