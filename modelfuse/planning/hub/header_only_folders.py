"""Folders that hold of the weights only the headers: enough to plan a merge, and nothing else.

The files have their true sizes, but are holes behind their headers, and are gone before anybody could merge them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from modelfuse.checkpoints.formats.safetensors import MAX_HEADER_BYTES
from modelfuse.planning.hub.client import Hub
from modelfuse.planning.hub.parallel_jobs import Stop, together
from modelfuse.planning.hub.resolve import Model, Silent
from modelfuse.recipe.hub_names import HubName

#: Bytes that are asked for first; most headers are shorter, and then one request is enough.
FIRST = 100_000
#: How the files end whose headers are at their beginning.
READABLE = ".safetensors"


def can_be_read(model: Model) -> bool:
    """Whether headers are enough of what the cache lacks."""
    return all(file.endswith(READABLE) for file in model.files.weights if not (model.folder / file).exists())


@contextmanager
def header_folders(hub: Hub, models: Sequence[Model]) -> Iterator[dict[object, HubName]]:
    """A folder for each model, by its name in the recipe, while the context lasts."""
    with tempfile.TemporaryDirectory(prefix="modelfuse-") as home:
        jobs: list[Callable[[Stop], None]] = []
        found: dict[object, HubName] = {}
        for model in models:
            if not model.missing:
                found[model.name] = model.place
                continue
            found[model.name] = replace(model.place, folder=Path(home, str(model.place)))
            jobs += [_job(hub, model, file, Path(home, str(model.place), file)) for file in model.files.all]
        together(jobs)
        yield found


def _job(hub: Hub, model: Model, file: str, target: Path) -> Callable[[Stop], None]:
    def make(_: Stop) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        cached, size = model.folder / file, model.sizes[file]
        if file in model.files.settings:
            shutil.copyfile(hub.fetch(model.place, file, Silent), target)
        elif file in model.files.weights and cached.exists():
            target.symlink_to(cached)
        else:
            with target.open("wb") as out:
                if file in model.files.weights:
                    out.write(_header(hub, model.place, file, size))
                os.truncate(out.fileno(), size)

    return make


def _header(hub: Hub, place: HubName, file: str, size: int) -> bytes:
    """The header of a safetensors file, or as much as there is of what is none."""
    start = hub.read_start(place, file, min(size, FIRST)) if size else b""
    length = min(8 + int.from_bytes(start[:8], "little"), size, 8 + MAX_HEADER_BYTES)
    return start[:length] if length <= len(start) else hub.read_start(place, file, length)
