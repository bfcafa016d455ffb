"""Check that optional libraries are installed."""

from __future__ import annotations

from importlib.util import find_spec

from modelfuse.errors import MissingExtraError


def require(module: str, what: str, instead: str, extra: str | None = None) -> None:
    """Check that a library is installed.

    Args:
        module: The name of its module.
        what: The feature that needs it, for the message.
        instead: What to do without it, for the hint.
        extra: The extra of modelfuse that installs it; None if it has the module's name.

    Raises:
        MissingExtraError: If it is not installed.
    """
    if find_spec(module) is None:
        raise MissingExtraError(
            f"{what} needs {module}, which is not installed",
            f"pip install 'modelfuse[{extra or module}]', or {instead}.",
        )
