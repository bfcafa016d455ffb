"""modelfuse merges the weights of large models at the speed of copying them.

>>> import modelfuse
>>> sorted(modelfuse.__all__)[-3:]
['check', 'merge', 'verify']
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelfuse.errors import (
    CheckpointError,
    ClusterError,
    HubError,
    MismatchError,
    MissingExtraError,
    ModelfuseError,
    OutputError,
    RecipeError,
)
from modelfuse.version import __version__

if TYPE_CHECKING:
    from modelfuse.execution.run import Progress, Result
    from modelfuse.inspection import verify as verification
    from modelfuse.inspection.report_reader import Problem
    from modelfuse.inspection.verify import Verification
    from modelfuse.planning.plan import Plan
    from modelfuse.recipe.recipe import Recipe
    from modelfuse.storage import Place

__all__ = [
    "CheckpointError",
    "ClusterError",
    "HubError",
    "MismatchError",
    "MissingExtraError",
    "ModelfuseError",
    "OutputError",
    "Plan",
    "Problem",
    "Recipe",
    "RecipeError",
    "Result",
    "Verification",
    "__version__",
    "check",
    "merge",
    "verify",
]

#: Imported when first used: importing modelfuse loads neither numpy nor msgspec nor a compiler.
_LATER = {
    "Plan": "modelfuse.planning.plan",
    "Problem": "modelfuse.inspection.report_reader",
    "Recipe": "modelfuse.recipe.recipe",
    "Result": "modelfuse.execution.run",
    "Verification": "modelfuse.inspection.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)


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
    from modelfuse.execution.run import run_plan
    from modelfuse.planning.hub import fetch
    from modelfuse.planning.plan import make_plan
    from modelfuse.recipe.recipe import Recipe
    from modelfuse.storage.named_hosts import name_hosts

    name_hosts(settings.values())
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
    from modelfuse.planning.hub import headers
    from modelfuse.planning.output_location import check_room
    from modelfuse.planning.plan import make_plan
    from modelfuse.recipe.recipe import Recipe
    from modelfuse.storage.named_hosts import name_hosts

    name_hosts(settings.values())
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
    hub_endpoint: str | None = None,
    hub_anonymous: bool = False,
    progress: verification.Progress | None = None,
) -> Verification:
    """Check that an output is what its merge wrote, and that the inputs give it.

    >>> verify("c").holds  # doctest: +SKIP
    True

    Args:
        path: The output of a merge.
        full: Merge every tensor again, not a sample; without the inputs, that is a problem. Only so are inputs that are
            in stores asked for.
        sample: How many tensors to merge again; by default as many as read and compare about 256 MB.
        n_process: Parallel workers; by default one a processor, up to eight.
        seed: Chooses the sample; another one each time if not given.
        hub_endpoint: Where models on a hub are fetched from, with ``full``; what the output says of it is not followed.
        hub_anonymous: Send no token there, and ask also a hub that only the output names.
        progress: Called with the bytes done since the last call and those to do in all; from worker threads.

    Returns:
        What was checked, and every problem found.

    Raises:
        CheckpointError: If the folder is no output of a merge, or its report cannot be understood.
        RecipeError: If a number is out of range.
    """
    from modelfuse.inspection.verify import verify_output
    from modelfuse.storage import place_of
    from modelfuse.storage.named_hosts import name_hosts

    name_hosts([path])
    return verify_output(
        place_of(path),
        full=full,
        sample=sample,
        n_process=n_process,
        seed=seed,
        hub_endpoint=hub_endpoint,
        hub_anonymous=hub_anonymous,
        progress=progress,
    )
