"""huggingface_hub's cache, read without asking the hub.

Its layout is documented: ``refs`` has a file per branch and tag with its last known commit, ``snapshots`` a folder per
commit. It has no list of a commit's files, so that list is stored in the library's folder for other tools' assets.
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
    """The folder of the files of ``name`` at its commit."""
    return _home(cache, name) / "snapshots" / str(name.revision)


def known_commit(cache: Path, name: HubName) -> str | None:
    """The last known commit of a revision, if any."""
    if name.commit is not None:
        return name.commit
    try:
        text = (_home(cache, name) / "refs" / (name.revision or MAIN)).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return HubName(name.name, text).commit


def remember_commit(cache: Path, name: HubName, commit: str) -> None:
    """Store the commit of a revision, after all files were fetched, for use without the hub."""
    if name.commit is None and known_commit(cache, name) != commit:
        _write(_home(cache, name) / "refs" / (name.revision or MAIN), commit)


def known_files(name: HubName) -> dict[str, int] | None:
    """The names and sizes in bytes of a commit's files, if they are stored."""
    try:
        found = json.loads(_listing(name).read_text(encoding="utf-8"))
        return {str(file): int(size) for file, size in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def remember_files(name: HubName, sizes: Mapping[str, int]) -> None:
    """Store the names and sizes of a commit's files."""
    _write(_listing(name), json.dumps(sizes))


def files_there(folder: Path) -> dict[str, int]:
    """The names and sizes in bytes of the files in a snapshot."""
    found = {}
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return found


def _home(cache: Path, name: HubName) -> Path:
    return cache / f"models--{name.name.replace('/', '--')}"


def _listing(name: HubName) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE, "modelfuse", name.name.replace("/", "--"), f"{name.revision}.json")


def _write(path: Path, text: str) -> None:
    """Write a small file atomically; errors are ignored, as the cache may be read-only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError:
        return
