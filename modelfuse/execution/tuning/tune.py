"""Run a search of settings, and merge with the best."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modelfuse.errors import OutputError, RecipeError
from modelfuse.execution.tuning.layer_groups import grouped
from modelfuse.execution.tuning.marks import read_space
from modelfuse.execution.tuning.request import Tuned, TuningRequest
from modelfuse.execution.tuning.search import Search, Tell
from modelfuse.execution.tuning.study import Study
from modelfuse.execution.tuning.usual_search import usual_space
from modelfuse.planning.hub import FetchDisplay, fetch
from modelfuse.planning.output_location import check_disk_space
from modelfuse.planning.plan import make_plan
from modelfuse.storage.local.lock import Lock

#: The name of the study's folder is that of the output with this suffix.
SUFFIX = ".tune"


def tune(request: TuningRequest, tell: Tell = lambda _: None, watch: FetchDisplay | None = None) -> Tuned:
    """Search settings of a recipe by evaluating merges, and merge with the best.

    Args:
        request: What to search.
        tell: Called with a sentence on each trial, and with notes.
        watch: Displays the progress of downloads.

    Raises:
        ModelfuseError: If the request is invalid, or a merge or an evaluation fails. The study keeps all finished
            trials, and the same request resumes from them.
    """
    started = time.perf_counter()
    request.check()
    space = read_space(request.settings)
    recipe = space.recipe(space.start)
    output = recipe.output_path
    if not isinstance(output, Path):
        raise RecipeError(
            "output_path is not given" if output is None else f"output_path is {output}",
            "Name a folder here for the best merge: the study is kept beside it.",
        )
    recipe = fetch(recipe, watch)
    space = space.with_inputs(recipe)
    plan = make_plan(recipe)
    check_disk_space(output, plan.disk_space)
    if request.groups:
        space = grouped(space, plan, request.groups, request.attention_apart)
    elif not space.dimensions:
        space = usual_space(space, recipe)
    space.check()
    plan = make_plan(space.recipe(space.start))
    study = Study(output.with_name(output.name + SUFFIX), request.sampler, recipe.seed)
    with _locked(study.path.parent, output):
        search = Search(request, space, study, tell)
        try:
            search.run(plan)
            return search.finish(output, started)
        except BaseException as error:
            if study.is_begun:
                error.add_note(f"The study in {study.path.parent} is kept: the same command resumes it.")
            raise


@contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    """Create the folder of the study if necessary, and hold its lock.

    Raises:
        OutputError: If it cannot be created, or another process holds the lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder / ".lock", folder)
        lock.acquire()
    except OSError as error:
        raise OutputError(f"{folder} cannot be used for the study of {output.name}: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):
            folder.rmdir()  # Fails unless it is empty: no trial has ended.
