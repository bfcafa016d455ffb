"""What huggingface_hub's cache holds of a model, without asking the hub.

Its folders are documented: ``refs`` has a file for each branch and tag with the commit it was last seen at,
``snapshots`` a folder for each commit. Which files a commit has is not in it, so that is kept beside it, in the place
that the library gives others for such things.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from modelfuse.recipe.hub_names import HubName

MAIN = "main"


def snapshot(cache: Path, name: HubName) -> Path:
    """The folder of a model's files at a commit."""
    return _home(cache, name) / "snapshots" / str(name.revision)


def known_commit(cache: Path, name: HubName) -> str | None:
    """The commit that a revision was last seen at, if any."""
    if name.commit is not None:
        return name.commit
    try:
        text = (_home(cache, name) / "refs" / (name.revision or MAIN)).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return HubName(name.name, text).commit


def remember_commit(cache: Path, name: HubName, commit: str) -> None:
    """Keep where a revision is, once its files are there, for when the hub cannot be asked."""
    if name.commit is None and known_commit(cache, name) != commit:
        _write(_home(cache, name) / "refs" / (name.revision or MAIN), commit)


def known_files(name: HubName) -> dict[str, int] | None:
    """The names and sizes of a commit's files, if they were remembered."""
    try:
        found = json.loads(_listing(name).read_text(encoding="utf-8"))
        return {str(file): int(size) for file, size in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def remember_files(name: HubName, sizes: Mapping[str, int]) -> None:
    """Keep the names and sizes of a commit's files, which never change."""
    _write(_listing(name), json.dumps(sizes))


def files_there(folder: Path) -> dict[str, int]:
    """The names and sizes of the files in a snapshot."""
    found = {}
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return found


def _home(cache: Path, name: HubName) -> Path:
    return cache / f"models--{name.name.replace('/', '--')}"


def _listing(name: HubName) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE, "modelfuse", name.name.replace("/", "--"), f"{name.revision}.json")


def _write(path: Path, text: str) -> None:
    """Write a small file whole or not at all; a cache that cannot be written to is no mistake."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError:
        return
