"""All that a merge needs of the models on a hub, fetched at once."""

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
from modelfuse.planning.hub.parallel_jobs import Stop, together
from modelfuse.planning.hub.progress import Advance, Watch
from modelfuse.planning.hub.resolve import Finder, Model, Silent
from modelfuse.planning.output_location import check_disk_space, check_output_path
from modelfuse.planning.plan import make_plan
from modelfuse.recipe.recipe import Recipe
from modelfuse.recipe.sizes import size

Check = Callable[[Recipe], int]


def fetch_models(recipe: Recipe, watch: Watch, ask: bool, check: Check | None = None) -> Recipe:
    """Bring what a merge needs into the cache; see :func:`modelfuse.planning.hub.fetch`."""
    check_output_path(recipe)
    finder = _finder(recipe, watch)
    models = finder.find(ask=ask)
    _download(finder.hub, recipe, models, watch, check or _disk_space_of)
    finder.keep(models)
    return recipe.at_hand({model.name: model.place for model in models})


@contextmanager
def fetch_headers(recipe: Recipe, watch: Watch) -> Iterator[Recipe]:
    """Bring what a plan needs into folders that last as long as the context: :func:`modelfuse.planning.hub.headers`."""
    check_output_path(recipe)
    finder = _finder(recipe, watch)
    models = finder.find()
    _check_disk(finder.hub, sum(model.missing_bytes for model in models))
    whole = [model for model in models if not can_be_read(model)]
    if whole:
        watch.tell(f"Other weights than safetensors are fetched whole: {', '.join(str(each.name) for each in whole)}.")
        _download(finder.hub, recipe, whole, watch, _disk_space_of)
        finder.keep(whole)
    with header_folders(finder.hub, models) as found:
        yield recipe.at_hand(found)


def _finder(recipe: Recipe, watch: Watch) -> Finder:
    hub = Hub(recipe.hub_endpoint, recipe.hub_names[0], recipe.hub_anonymous)
    if watch.fetching is not None:  # huggingface_hub is not to show anything in this process.
        hub.settle_in()
    return Finder(hub, recipe, watch.tell)


def _disk_space_of(recipe: Recipe) -> int:
    return make_plan(recipe).disk_space


def _download(hub: Hub, recipe: Recipe, models: Sequence[Model], watch: Watch, check: Check) -> None:
    """Fetch all files that the cache lacks, of all models at once."""
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
    shown = nullcontext(None) if watch.fetching is None else watch.fetching(size)
    try:
        with shown as advance:
            together(_job(hub, model, file, advance) for model, file in in_turn)
    except (HubError, KeyboardInterrupt) as error:
        error.add_note("What was fetched whole is kept: the same command resumes from there.")
        raise


def _job(hub: Hub, model: Model, file: str, advance: Advance | None) -> Callable[[Stop], None]:
    """Fetch one file; count its bytes, if that is wanted."""

    def fetch(stop: Stop) -> None:
        if advance is None:
            hub.fetch(model.place, file, None)
            return
        count, done = advance, 0

        class Bar(Silent):
            def update(self, more: float | None = 1) -> None:
                nonlocal done
                stop.check()
                done += int(more or 0)
                count(int(more or 0))

        hub.fetch(model.place, file, Bar)
        count(model.sizes[file] - done)  # Nothing is counted of what another model has brought already.

    return fetch


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.exists())


def _same_disk(one: Path, other: Path) -> bool:
    return os.stat(_existing(one)).st_dev == os.stat(_existing(other)).st_dev


def _check_disk(hub: Hub, needed: int, output: int = 0) -> None:
    """Whether there is room for what is to be fetched, and beside it for an output of so many bytes."""
    free = shutil.disk_usage(_existing(hub.cache)).free
    if needed + output > free:
        both = f", and their merge {size(output)} on the same disk" if output else ""
        raise HubError(
            f"The models need {size(needed)} in the cache {hub.cache}{both}, but only {size(free)} are free there",
            "Free some space, or name a cache on another disk with HF_HOME.",
        )
