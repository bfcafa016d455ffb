"""Temporary folders with only the headers of weight files, for planning.

The files have their true sizes, but are sparse after their headers. The folders are removed before anything is merged.
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
from modelfuse.planning.hub.parallel_jobs import StopFlag, run_parallel
from modelfuse.planning.hub.resolve import HubModel, SilentBar
from modelfuse.recipe.hub_names import HubName

#: Bytes of the first request; most headers are shorter, so that one request is enough.
FIRST = 100_000
#: The suffix of formats with a header at the start of the file.
READABLE = ".safetensors"


def can_be_read(model: HubModel) -> bool:
    """Whether all weight files that are not in the cache have a header that can be read by itself."""
    return all(file.endswith(READABLE) for file in model.files.weights if not (model.folder / file).exists())


@contextmanager
def header_folders(hub: Hub, models: Sequence[HubModel]) -> Iterator[dict[object, HubName]]:
    """A folder for each model, by its name in the recipe; removed at the end of the context."""
    with tempfile.TemporaryDirectory(prefix="modelfuse-") as home:
        jobs: list[Callable[[StopFlag], None]] = []
        found: dict[object, HubName] = {}
        for model in models:
            if not model.missing:
                found[model.name] = model.pinned
                continue
            found[model.name] = replace(model.pinned, folder=Path(home, str(model.pinned)))
            jobs += [_job(hub, model, file, Path(home, str(model.pinned), file)) for file in model.files.all]
        run_parallel(jobs)
        yield found


def _job(hub: Hub, model: HubModel, file: str, target: Path) -> Callable[[StopFlag], None]:
    def make(_: StopFlag) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        cached, size = model.folder / file, model.sizes[file]
        if file in model.files.settings:
            shutil.copyfile(hub.fetch(model.pinned, file, SilentBar), target)
        elif file in model.files.weights and cached.exists():
            target.symlink_to(cached)
        else:
            with target.open("wb") as out:
                if file in model.files.weights:
                    out.write(_header(hub, model.pinned, file, size))
                os.truncate(out.fileno(), size)

    return make


def _header(hub: Hub, pinned: HubName, file: str, size: int) -> bytes:
    """The header of a safetensors file; for a malformed file, at most the largest possible header."""
    start = hub.read_start(pinned, file, min(size, FIRST)) if size else b""
    length = min(8 + int.from_bytes(start[:8], "little"), size, 8 + MAX_HEADER_BYTES)
    return start[:length] if length <= len(start) else hub.read_start(pinned, file, length)
