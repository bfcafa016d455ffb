"""Evaluate merged models with a command or a function of the user."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Protocol

from modelfuse.errors import EvaluationError, RecipeError
from modelfuse.printable import one_line
from modelfuse.recipe.checks import shown

#: The placeholder of the merged model's folder in a command.
MODEL = "{model}"
#: The name of a single number.
VALUE = "value"
#: The last bytes of a command's output that are parsed, and the last lines of it that messages show.
MOST_BYTES, MOST_LINES = 1 << 20, 20
#: Seconds between SIGTERM and SIGKILL.
GRACE = 3.0

HINT = "Try it on a merge of the recipe. Once it works, the same command resumes the search."

#: The results of an evaluation, by name.
Numbers = dict[str, float]


class Evaluation(Protocol):
    """Evaluates a merged model."""

    @property
    def description(self) -> str:
        """Identifies the evaluation: a study is resumed only with the same one."""

    def __call__(self, folder: Path) -> Numbers:
        """Evaluate the model in a folder.

        Raises:
            EvaluationError: If it fails or gives no number.
        """

    def stop(self) -> None:
        """Abort running evaluations; safe from any thread."""


class Command:
    """A shell command that prints a number or a JSON object of numbers.

    Args:
        text: The command, with ``{model}`` in place of the folder.

    Raises:
        RecipeError: If it has no ``{model}``.
    """

    def __init__(self, text: str) -> None:
        if MODEL not in text:
            raise RecipeError(
                f"evaluate is {shown(text)}, which has no {MODEL} for the merged model's folder",
                f"Insert it: --evaluate 'python eval.py {MODEL}'.",
            )
        self.description = text
        self._running = set[subprocess.Popen[bytes]]()
        self._lock = threading.Lock()
        self._stopped = False

    def __call__(self, folder: Path) -> Numbers:
        command = self.description.replace(MODEL, shlex.quote(str(folder)))
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            status = self._run(command, stdout, stderr)
            if status:
                ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
                raise EvaluationError(
                    f"The evaluation {ended}: {one_line(command)}{_tail(stderr) or _tail(stdout)}", HINT
                )
            try:
                return numbers_in(_text(stdout))
            except ValueError as error:
                raise EvaluationError(
                    f"The evaluation printed no number: {error}\n  {one_line(command)}{_tail(stdout)}{_tail(stderr)}",
                    f"Its last line should be a number or a JSON object of numbers. {HINT}",
                ) from None

    def _run(self, command: str, stdout: IO[bytes], stderr: IO[bytes]) -> int:
        with self._lock:
            if self._stopped:
                raise EvaluationError("The evaluation was aborted")
            process = subprocess.Popen(
                command, shell=True, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
            )
            self._running.add(process)
        try:
            return process.wait()
        except BaseException:
            _end(process)
            raise
        finally:
            with self._lock:
                self._running.discard(process)

    def stop(self) -> None:
        with self._lock:
            self._stopped, running = True, [*self._running]
        for process in running:
            _end(process)


class Function:
    """A function of the user's program.

    Args:
        function: Called with the folder; returns a number, or a mapping of names to numbers.
    """

    description = "a function"

    def __init__(self, function: Callable[[Path], object]) -> None:
        self._function = function

    def __call__(self, folder: Path) -> Numbers:
        result = self._function(folder)
        try:
            return _numbers(result)
        except ValueError as error:
            raise EvaluationError(f"evaluate has returned no number: {error}") from None

    def stop(self) -> None:
        """Do nothing: a running function cannot be aborted."""


def numbers_in(text: str) -> Numbers:
    r"""Parse the output of a command: all of it, or its last line.

    >>> numbers_in("epoch 1\n0.25\n"), numbers_in('{"math": 1.5, "chat": 2}')
    ({'value': 0.25}, {'math': 1.5, 'chat': 2.0})

    Raises:
        ValueError: If neither is a number or a JSON object of numbers.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("nothing was printed")
    for part in dict.fromkeys((text.strip(), lines[-1].strip())):
        with contextlib.suppress(ValueError, RecursionError):
            return _numbers(json.loads(part))
        with contextlib.suppress(ValueError):
            return {VALUE: float(part)}
    with contextlib.suppress(json.JSONDecodeError, RecursionError):
        return _numbers(json.loads(lines[-1]))
    raise ValueError(f"the last line is {shown(lines[-1].strip())}")


def _numbers(found: object) -> Numbers:
    if isinstance(found, Mapping) and found:
        return {str(name): _number(each, f"{shown(name)} ") for name, each in found.items()}
    return {VALUE: _number(found, "")}


def _number(value: object, name: str) -> float:
    """A number as a Python float; it may be one of numpy or torch.

    Raises:
        ValueError: If it is not a number.
    """
    if isinstance(value, bool | str | bytes) or value is None:
        raise ValueError(f"{name}is {shown(value)}".strip())
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}is {shown(value)}".strip()) from None


def _text(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - MOST_BYTES))
    return file.read().decode(errors="replace")


def _tail(file: IO[bytes]) -> str:
    """The last lines of an output, indented, each after a newline."""
    lines = [line.rstrip() for line in _text(file).splitlines() if line.strip()]
    return "".join(f"\n  {one_line(line)}" for line in lines[-MOST_LINES:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Terminate a command and all processes of its session, first by SIGTERM, then by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:  # Its id may be another process's by now.
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
