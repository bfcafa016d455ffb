"""The command line: words in, a recipe out; what happened, for people to read."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
from collections.abc import Mapping, Sequence

from modelfuse.cli import console
from modelfuse.cli.commands import COMMANDS, LISTED, show_help
from modelfuse.cli.termination import terminable
from modelfuse.errors import ModelfuseError, RecipeError
from modelfuse.recipe.checks import closest
from modelfuse.storage.named_hosts import name_hosts
from modelfuse.version import __version__


def main(words: Sequence[str] | None = None, **defaults: object) -> int:
    """Run the command line.

    Args:
        words: Of the command; those of this process if None.
        defaults: What settings are where neither a flag nor a recipe says anything.

    Returns:
        The exit status: 0 done, 2 the request or an input is wrong, 1 anything else, 130 interrupted. SIGTERM ends the
        process, once it was said what is kept.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # Closed by the caller, and its number would be given to the next file.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    console.begin_logs(False, None)
    gc.freeze()
    gc.enable()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # Any path and formula can be shown anywhere.
    with terminable():
        return _status_of(list(sys.argv[1:] if words is None else words), defaults)


def _status_of(given: list[str], defaults: Mapping[str, object]) -> int:
    """Run a command, and tell what went wrong."""
    try:
        status = _run([*given], defaults)
        sys.stdout.flush()
        return status
    except BaseException as error:
        status, told = _failed(error)
        if "--json" in given and told is not None:
            from modelfuse.cli import documents, json_output

            json_output.write(documents.of_error(type(error).__name__, told, status))
        return status


def _failed(error: BaseException) -> tuple[int, ModelfuseError | None]:
    """Tell of what ended a command.

    Returns:
        The exit status, and the message; None where nobody listens.

    Raises:
        BaseException: If it is none that is told.
    """
    from modelfuse.cli import render

    if isinstance(error, ModelfuseError):
        render.error(error)
        return 2, error
    if isinstance(error, KeyboardInterrupt):
        render.interrupted(error)
        return 130, _as_told(error, "interrupted")
    if isinstance(error, OSError):
        return 1, _tell_failure(error)
    if isinstance(error, MemoryError):
        told = _as_told(error, f"There is not enough memory: {error}", "Give a smaller --memory, or fewer --n_process.")
        render.error(told)
        return 1, told
    if isinstance(error, Exception):
        render.bug()
        return 1, _as_told(error, f"This is a bug in modelfuse: {error!r}", "Please report it.")
    raise error


def _tell_failure(error: OSError) -> ModelfuseError | None:
    """Tell of what the system could not do, and nobody is to blame for: a failing disk, or a full one."""
    from modelfuse.cli import render

    place = error.filename
    if not isinstance(place, str | bytes):
        # Only printing fails without the name of a file. What could not be written would be tried again at the end.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return None  # Whoever reads it, such as `head`, has seen enough.
        place = "standard output"
    told = _as_told(error, f"{os.fsdecode(place)}: {error.strerror or error}")
    render.error(told)
    return told


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
        return show_help(words) if command else show_help([]) or 2
    if command not in COMMANDS:
        raise RecipeError(f"There is no command {command!r}", f"{closest(command, COMMANDS)}{LISTED}".lstrip())
    if "-h" in words or "--help" in words:
        return show_help([command])
    name_hosts(words)
    return COMMANDS[command](words, defaults)
