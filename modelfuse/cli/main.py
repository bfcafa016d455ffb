"""The entry point of the command line: runs a command, and reports errors."""

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


def main(argv: Sequence[str] | None = None, **defaults: object) -> int:
    """Run the command line.

    Args:
        argv: The arguments; those of this process if None.
        defaults: Values of settings that are not given.

    Returns:
        The exit status: 0 done, 2 the request or an input is wrong, 130 interrupted, 1 anything else. After SIGTERM,
        the process is killed by the signal once messages are written.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # Closed by the caller; the next file would get its descriptor.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    console.configure_logs(False, None)
    gc.freeze()
    gc.enable()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # For any path and formula, in any encoding.
    with terminable():
        return _status_of(list(sys.argv[1:] if argv is None else argv), defaults)


def _status_of(given: list[str], defaults: Mapping[str, object]) -> int:
    """Run a command, and report its error."""
    try:
        status = _run([*given], defaults)
        sys.stdout.flush()
        return status
    except BaseException as error:
        status, reported = _failed(error)
        if "--json" in given and reported is not None:
            from modelfuse.cli import documents, json_output

            json_output.write(documents.of_error(type(error).__name__, reported, status))
        return status


def _failed(error: BaseException) -> tuple[int, ModelfuseError | None]:
    """Report the error that ended a command.

    Returns:
        The exit status, and the error for a JSON document; None if standard output is closed.

    Raises:
        BaseException: If it is not an error of a command, such as SystemExit.
    """
    from modelfuse.cli import render

    if isinstance(error, ModelfuseError):
        render.error(error)
        return 2, error
    if isinstance(error, KeyboardInterrupt):
        render.interrupted(error)
        return 130, _with_message(error, "interrupted")
    if isinstance(error, OSError):
        return 1, _report_system_error(error)
    if isinstance(error, MemoryError):
        hint = "Give a smaller --memory, or fewer --n_process."
        reported = _with_message(error, f"There is not enough memory: {error}", hint)
        render.error(reported)
        return 1, reported
    if isinstance(error, Exception):
        render.bug()
        return 1, _with_message(error, f"This is a bug in modelfuse: {error!r}", "Please report it.")
    raise error


def _report_system_error(error: OSError) -> ModelfuseError | None:
    """Report an error of the system, such as a failing disk; None if the reader of standard output is gone."""
    from modelfuse.cli import render

    path = error.filename
    if not isinstance(path, str | bytes):
        # Only printing fails without a file's name. Python would try again to write its buffer at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return None  # The reader has ended, such as `head`.
        path = "standard output"
    reported = _with_message(error, f"{os.fsdecode(path)}: {error.strerror or error}")
    render.error(reported)
    return reported


def _with_message(error: BaseException, message: str, hint: str | None = None) -> ModelfuseError:
    """An error with another message, and the notes of the original one."""
    reported = ModelfuseError(message, hint)
    for note in getattr(error, "__notes__", ()):
        reported.add_note(note)
    return reported


def _run(argv: list[str], defaults: Mapping[str, object]) -> int:
    command = argv.pop(0) if argv else ""
    if command in ("-V", "--version"):
        print(f"modelfuse {__version__}")
        return 0
    if command in ("", "-h", "--help", "help"):
        return show_help(argv) if command else show_help([]) or 2
    if command not in COMMANDS:
        raise RecipeError(f"There is no command {command!r}", f"{closest(command, COMMANDS)}{LISTED}".lstrip())
    if "-h" in argv or "--help" in argv:
        return show_help([command])
    name_hosts(argv)
    return COMMANDS[command](argv, defaults)
