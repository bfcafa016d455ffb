"""A merged model becomes numbers: by the user's command, or by a function."""

from __future__ import annotations

import contextlib
import json
import math
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

#: What stands for the folder of the merged model in a command.
MODEL = "{model}"
#: What a single number is called.
VALUE = "value"
#: Bytes of what a command has said that are looked at, and lines of it that are shown.
MOST_BYTES, MOST_LINES = 1 << 20, 20
#: Seconds that a command has to end by itself when it is no longer wanted.
GRACE = 3.0

HINT = "Try it on a merge of the recipe. Once it works, the same command goes on."

#: What evaluating gives, by name.
Numbers = dict[str, float]


class Evaluation(Protocol):
    """Tells how good a merged model is."""

    @property
    def told(self) -> str:
        """What tells it from others, for a study that goes on."""

    def __call__(self, folder: Path) -> Numbers:
        """The numbers of a merged model.

        Raises:
            EvaluationError: If there are none.
        """

    def stop(self) -> None:
        """Give up what is under way; safe from any thread."""


class Command:
    """A command of the user's, which prints a number or a JSON object of numbers.

    Args:
        text: For the shell, with ``{model}`` where the folder is to stand.

    Raises:
        RecipeError: If it does not say where.
    """

    def __init__(self, text: str) -> None:
        if MODEL not in text:
            raise RecipeError(
                f"evaluate is {shown(text)}, which does not say where the merged model is to stand",
                f"Put {MODEL} there: --evaluate 'python eval.py {MODEL}'.",
            )
        self.told = text
        self._running = set[subprocess.Popen[bytes]]()
        self._lock = threading.Lock()
        self._stopped = False

    def __call__(self, folder: Path) -> Numbers:
        command = self.told.replace(MODEL, shlex.quote(str(folder)))
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as complained:
            status = self._run(command, said, complained)
            if status:
                ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
                raise EvaluationError(
                    f"The evaluation {ended}: {one_line(command)}{_tail(complained) or _tail(said)}", HINT
                )
            try:
                return numbers_in(_text(said))
            except ValueError as error:
                raise EvaluationError(
                    f"The evaluation printed no number: {error}\n  {one_line(command)}{_tail(said)}{_tail(complained)}",
                    f"It should print one number, or a JSON object of numbers, in its last line. {HINT}",
                ) from None

    def _run(self, command: str, said: IO[bytes], complained: IO[bytes]) -> int:
        with self._lock:
            if self._stopped:
                raise EvaluationError("The evaluation was given up")
            process = subprocess.Popen(
                command, shell=True, stdin=subprocess.DEVNULL, stdout=said, stderr=complained, start_new_session=True
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
        function: Given the folder, returns a number or a mapping of numbers.
    """

    told = "a function"

    def __init__(self, function: Callable[[Path], object]) -> None:
        self._function = function

    def __call__(self, folder: Path) -> Numbers:
        result = self._function(folder)
        try:
            return _numbers(result)
        except ValueError as error:
            raise EvaluationError(f"evaluate has returned no number: {error}") from None

    def stop(self) -> None:
        """Nothing: a function returns when it does."""


def numbers_in(text: str) -> Numbers:
    r"""What a command has printed: all of it, or its last line.

    >>> numbers_in("epoch 1\n0.25\n"), numbers_in('{"math": 1.5, "chat": 2}')
    ({'value': 0.25}, {'math': 1.5, 'chat': 2.0})

    Raises:
        ValueError: If that is neither a number nor an object of numbers.
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
    """A number of Python's, numpy's or torch's."""
    if isinstance(value, bool | str | bytes) or value is None:
        raise ValueError(f"{name}is {shown(value)}".strip())
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}is {shown(value)}".strip()) from None


def is_number(value: float) -> bool:
    """Whether it says anything of how good a model is; a broken one's loss may be none."""
    return math.isfinite(value)


def _text(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - MOST_BYTES))
    return file.read().decode(errors="replace")


def _tail(file: IO[bytes]) -> str:
    """The last lines of what was said, indented; nothing if that is nothing."""
    lines = [line.rstrip() for line in _text(file).splitlines() if line.strip()]
    return "".join(f"\n  {one_line(line)}" for line in lines[-MOST_LINES:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command with all that it has started."""
    for name in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:  # Its number may be another process's now.
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, name)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
