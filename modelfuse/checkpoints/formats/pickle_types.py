"""Types of the pickle interpreter's results, and of the tables that its callers pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from modelfuse.errors import CheckpointError
from modelfuse.storage import PathOrUrl

MAX_DIMENSIONS = 32

NEVER_EXECUTED = (
    "modelfuse never executes code from a checkpoint. If you trust this file, load it with the library "
    "that wrote it and save it as safetensors."
)


class Refused(Exception):
    """Raised inside the readers of pickled checkpoints, which do not know the file's name.

    Args:
        why: The problem, as it follows the file's name in a message.
        hint: The hint.
    """

    def __init__(self, why: str, hint: str | None = "Fetch or save it again.") -> None:
        super().__init__(why)
        self.why = why
        self.hint = hint


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A byte string left in the file: ``length`` bytes from ``offset`` on."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class TextRange:
    """A long text left in the file: ``length`` bytes of UTF-8 from ``offset`` on."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Builder:
    """A callable entry of the table: one of our functions, which replaces the global of that name.

    It checks the pickled arguments in constant time, and raises Refused if the library that writes such files would not
    have written them.
    """

    build: Callable[[tuple[object, ...]], object]


class Stateful:
    """A built object that a BUILD opcode may complete."""

    __slots__ = ()

    def set_state(self, state: object) -> None:
        """Take the pickled state; raises Refused if it is not as expected."""
        raise NotImplementedError


class Inert(Stateful):
    """An object that is not a tensor and is ignored, except for a check whether it contains tensors."""

    __slots__ = ("parts",)

    def __init__(self, *parts: object) -> None:
        self.parts = list(parts)

    def set_state(self, state: object) -> None:
        """Keep the state among the parts."""
        self.parts.append(state)


@contextmanager
def naming(path: PathOrUrl) -> Iterator[None]:
    """Turn Refused into a CheckpointError that names the file."""
    try:
        yield
    except Refused as refused:
        raise CheckpointError(f"{path} cannot be read: {refused.why}", refused.hint) from None


def counts(value: object, what: str) -> tuple[int, ...]:
    """Check that a pickled value is a shape or a stride: a short sequence of non-negative integers."""
    if not isinstance(value, tuple | list) or len(value) > MAX_DIMENSIONS:
        raise Refused(f"{what} is not a short tuple")
    for item in value:
        count(item, what)
    return tuple(value)


def count(value: object, what: str) -> int:
    """Check that a pickled value is a size or an offset."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise Refused(f"{what} is not a count")
    return value


def _ordered_dict(arguments: tuple[object, ...]) -> dict[object, object]:
    if arguments:
        raise Refused("an OrderedDict in it is not built as Python 3 does", NEVER_EXECUTED)
    return {}


#: Plain containers and values that any pickle may contain; the last ones are ignored.
PLAIN_NAMES: Mapping[str, object] = {
    "collections OrderedDict": Builder(_ordered_dict),
    **{
        f"{module} {name}": Builder(Inert)
        for module in ("builtins", "__builtin__")
        for name in ("set", "frozenset", "bytes", "bytearray", "complex")
    },
}


def not_this_format(start: bytes, library: str) -> Refused:
    """The error for a file that begins with these bytes."""
    if start.startswith(b"version https://git-lfs"):
        return Refused("it is a Git LFS pointer, not the file itself", "Fetch it with: git lfs pull")
    return Refused(f"it is no file that {library} writes", "Check the path and the file's name.")
