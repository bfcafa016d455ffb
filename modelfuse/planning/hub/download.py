"""Fetch the files that a merge or a plan needs of models on a hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain, zip_longest
from pathlib import Path

from modelfuse.checkpoints.output.atomic_folder import bytes_left
from modelfuse.errors import HubError
from modelfuse.planning.hub.client import Hub
from modelfuse.planning.hub.header_only_folders import can_be_read, header_folders
from modelfuse.planning.hub.parallel_jobs import StopFlag, run_parallel
from modelfuse.planning.hub.progress import Advance, FetchDisplay
from modelfuse.planning.hub.resolve import HubModel, ModelFinder, SilentBar
from modelfuse.planning.output_location import check_disk_space, check_output_path
from modelfuse.planning.plan import make_plan
from modelfuse.recipe.recipe import Recipe
from modelfuse.recipe.sizes import size

Check = Callable[[Recipe], int]


def fetch_models(recipe: Recipe, display: FetchDisplay, ask: bool, check: Check | None = None) -> Recipe:
    """Fetch the files that a merge needs into the cache: :func:`modelfuse.planning.hub.fetch`."""
    check_output_path(recipe)
    finder = _finder(recipe, display)
    models = finder.find(ask=ask)
    _download(finder.hub, recipe, models, display, check or _disk_space_of)
    finder.keep(models)
    return recipe.at_hand({model.name: model.pinned for model in models})


@contextmanager
def fetch_headers(recipe: Recipe, display: FetchDisplay) -> Iterator[Recipe]:
    """Fetch the files that a plan needs into temporary folders: :func:`modelfuse.planning.hub.headers`."""
    check_output_path(recipe)
    finder = _finder(recipe, display)
    models = finder.find()
    _check_disk(finder.hub, sum(model.missing_bytes for model in models))
    whole = [model for model in models if not can_be_read(model)]
    if whole:
        names = ", ".join(str(each.name) for each in whole)
        display.tell(f"Weights that are not safetensors files are fetched whole, not only their headers: {names}.")
        _download(finder.hub, recipe, whole, display, _disk_space_of)
        finder.keep(whole)
    with header_folders(finder.hub, models) as found:
        yield recipe.at_hand(found)


def _finder(recipe: Recipe, display: FetchDisplay) -> ModelFinder:
    hub = Hub(recipe.hub_endpoint, recipe.hub_names[0], recipe.hub_anonymous)
    if display.fetching is not None:  # Then huggingface_hub must not show its own bars.
        hub.configure_library()
    return ModelFinder(hub, recipe, display.tell)


def _disk_space_of(recipe: Recipe) -> int:
    return make_plan(recipe).disk_space


def _download(hub: Hub, recipe: Recipe, models: Sequence[HubModel], display: FetchDisplay, check: Check) -> None:
    """Fetch all files that are not in the cache, of all models concurrently."""
    missing = [[(model, file) for file in model.missing] for model in models]
    size = sum(model.missing_bytes for model in models)
    if not any(missing):
        return
    _check_disk(hub, size)
    if all(can_be_read(model) for model in models):
        with header_folders(hub, models) as found:
            needed = check(recipe.at_hand(found))
        check_disk_space(recipe.output_path, needed)
        if isinstance(recipe.output_path, Path) and _same_disk(recipe.output_path, hub.cache):
            _check_disk(hub, size, max(0, needed - bytes_left(recipe.output_path)))
    in_turn = [each for each in chain(*zip_longest(*missing)) if each is not None]
    shown = nullcontext(None) if display.fetching is None else display.fetching(size)
    try:
        with shown as advance:
            run_parallel(_job(hub, model, file, advance) for model, file in in_turn)
    except (HubError, KeyboardInterrupt) as error:
        error.add_note("Files that were fetched completely are kept; the same command resumes from there.")
        raise


def _job(hub: Hub, model: HubModel, file: str, advance: Advance | None) -> Callable[[StopFlag], None]:
    """A job that fetches one file, and counts its bytes if ``advance`` is given."""

    def fetch(stop: StopFlag) -> None:
        if advance is None:
            hub.fetch(model.pinned, file, None)
            return
        count, done = advance, 0

        class Bar(SilentBar):
            def update(self, more: float | None = 1) -> None:
                nonlocal done
                stop.check()
                done += int(more or 0)
                count(int(more or 0))

        hub.fetch(model.pinned, file, Bar)
        count(model.sizes[file] - done)  # The rest was in the cache already, fetched for another model.

    return fetch


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.exists())


def _same_disk(one: Path, other: Path) -> bool:
    return os.stat(_existing(one)).st_dev == os.stat(_existing(other)).st_dev


def _check_disk(hub: Hub, needed: int, output: int = 0) -> None:
    """Check that the cache's disk has space for ``needed`` bytes, and for ``output`` bytes of a merge beside them."""
    free = shutil.disk_usage(_existing(hub.cache)).free
    if needed + output > free:
        both = f", and their merge {size(output)} on the same disk" if output else ""
        raise HubError(
            f"The models need {size(needed)} in the cache {hub.cache}{both}, but only {size(free)} are free there",
            "Free some space, or set HF_HOME to a folder on another disk.",
        )
