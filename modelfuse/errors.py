"""The errors of modelfuse.

::

    ModelfuseError            anything that modelfuse refuses or gives up on
    ├── RecipeError           a setting is unknown, out of range or contradicts another
    ├── CheckpointError       an input file is missing, malformed, or holds values that cannot be merged
    │   └── HubError          a model cannot be fetched from the hub
    ├── MismatchError         each input is sound, but they do not fit together
    ├── OutputError           the output cannot be written where it was asked for
    ├── EvaluationError       a merged model cannot be evaluated as was asked
    ├── MissingExtraError     the request needs a library that is not installed
    └── ClusterError          a cluster cannot be reached, or does not do its work

All of them mean that the request or an input is at fault: the command line prints the message
without a traceback and exits with status 2.
"""

from __future__ import annotations


class ModelfuseError(Exception):
    """The root of the tree.

    Args:
        message: What is wrong, naming the file, the tensor or the setting; made fit to be shown.
        hint: What to do about it.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        from modelfuse.printable import printable  # Most programs that import modelfuse raise none.

        self.message: str = printable(message)
        self.hint: str | None = hint and printable(hint)
        super().__init__(self.message, self.hint)

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class RecipeError(ModelfuseError):
    """Raised before any file is opened: the settings themselves are wrong."""


class CheckpointError(ModelfuseError):
    """Raised while an input is opened or read."""


class HubError(CheckpointError):
    """Raised where a model is not on the hub, may not be fetched, or finds no room; or the hub cannot be reached."""


class MismatchError(ModelfuseError):
    """Raised while planning: names, shapes or kinds differ between the models."""


class OutputError(ModelfuseError):
    """Raised when the output exists already, lies inside an input, or does not fit on the disk."""


class MissingExtraError(ModelfuseError):
    """Raised when a device or tensor type needs a library that is not installed.

    What its hint calls ``'modelfuse[extra]'`` is shown as pip installs it here, which may be from a folder.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        if hint is not None and "'modelfuse[" in hint:
            hint = hint.replace("'modelfuse[", f"'{_installed_from()}[")
        super().__init__(message, hint)


def _installed_from() -> str:
    """What pip is to be given for another extra of what runs here: a folder, or the name."""
    import json
    from importlib.metadata import PackageNotFoundError, distribution
    from pathlib import Path
    from urllib.parse import unquote, urlsplit

    clone = Path(__file__).resolve().parent.parent
    if (clone / "pyproject.toml").is_file():
        return str(clone)
    try:
        direct = json.loads(distribution("modelfuse").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return "modelfuse"
    folder = unquote(urlsplit(direct.get("url", "")).path) if "dir_info" in direct else ""
    return folder if folder and (Path(folder) / "pyproject.toml").is_file() else "modelfuse"


class EvaluationError(ModelfuseError):
    """Raised when what evaluates merged models fails, or gives no number."""


class ClusterError(ModelfuseError):
    """Raised when a cluster cannot be reached, lacks what a merge needs, or fails at a task again and again."""
