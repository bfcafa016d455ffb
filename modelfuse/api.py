"""The Python interface: a merge in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelfuse.hub import fetch, headers
from modelfuse.places import check_room
from modelfuse.plan import Plan, make_plan
from modelfuse.recipe import Recipe
from modelfuse.storage import Place, place_of

if TYPE_CHECKING:
    from modelfuse import verification
    from modelfuse.run import Progress, Result


def merge(*, progress: Progress | None = None, **settings: Any) -> Result:
    """Merge models into a new folder.

    >>> merge(model_path_list=["a", "b"], output_path="c", merge_method="linear")  # doctest: +SKIP
    Result(output_path=PosixPath('/…/c'), merged=291, copied=0, …)

    Args:
        progress: Called with a number of bytes whenever so many more are done; from worker threads. Models that are
            named as on a hub are fetched before, with the progress bars of huggingface_hub.
        **settings: The settings of :class:`modelfuse.Recipe`, by the names of the command line.

    Returns:
        Where the output is, and what was done.

    Raises:
        ModelfuseError: One of its kinds; nothing is then left at ``output_path`` that was not there before.
            If the disk was full or failed, what is done is kept beside it, and the same call goes on from there.
    """
    from modelfuse.run import run_plan

    return run_plan(make_plan(fetch(Recipe.parse(settings))), progress)


def check(**settings: Any) -> Plan:
    """Plan a merge from the checkpoints' headers, without reading a tensor or writing anything.

    Args:
        **settings: As for :func:`merge`; ``output_path`` may be left out.

    Returns:
        The plan: what will be merged, copied and left out, and what it will cost. It is to be looked at: of models on
        a hub that are not in the cache, no more than the headers was there while it was made.

    Raises:
        ModelfuseError: As :func:`merge` would, before any work.
    """
    with headers(Recipe.parse(settings)) as recipe:
        plan = make_plan(recipe)
    check_room(plan.recipe.output_path, plan.room)
    return plan


def verify(
    path: Place | str,
    full: bool = False,
    *,
    sample: int | None = None,
    n_process: int | None = None,
    seed: int | None = None,
    progress: verification.Progress | None = None,
) -> verification.Verification:
    """Check that an output is what its merge wrote, and that the inputs give it.

    >>> verify("c").holds  # doctest: +SKIP
    True

    Args:
        path: The output of a merge.
        full: Merge every tensor again, not a sample; without the inputs, that is a problem.
        sample: How many tensors to merge again; by default as many as read and compare about 256 MB.
        n_process: Parallel workers; by default one a processor, up to eight.
        seed: Chooses the sample; another one each time if not given.
        progress: Called with the bytes done since the last call and those to do in all; from worker threads.

    Returns:
        What was checked, and every problem found.

    Raises:
        CheckpointError: If the folder is no output of a merge, or its report cannot be understood.
        RecipeError: If a number is out of range.
    """
    from modelfuse.verification import verify_output

    return verify_output(place_of(path), full=full, sample=sample, n_process=n_process, seed=seed, progress=progress)
