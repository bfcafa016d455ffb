"""Libraries that only some requests need."""

from __future__ import annotations

from importlib.util import find_spec

from modelfuse.errors import MissingExtraError


def need(module: str, what: str, instead: str, extra: str | None = None) -> None:
    """Make sure that a library is installed.

    Args:
        module: The library.
        what: What needs it.
        instead: What to do without it.
        extra: The extra that installs it; None: it has the library's name.

    Raises:
        MissingExtraError: If it is not installed.
    """
    if find_spec(module) is None:
        raise MissingExtraError(
            f"{what} needs {module}, which is not installed",
            f"pip install 'modelfuse[{extra or module}]', or {instead}.",
        )
