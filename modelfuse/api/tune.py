"""``modelfuse.tune``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path

from modelfuse.api.functions import tell_of
from modelfuse.cli.tune import evaluation_of
from modelfuse.execution.tuning.evaluation import Function
from modelfuse.execution.tuning.request import Tuned, TuningRequest
from modelfuse.execution.tuning.tune import tune as run_request
from modelfuse.planning.hub import QUIET
from modelfuse.recipe.files import load_recipe
from modelfuse.recipe.hosts_in_files import without_hosts
from modelfuse.recipe.names import by_canonical_name
from modelfuse.storage.named_hosts import name_hosts

Evaluate = Callable[[Path], float | Mapping[str, float]]


def tune(
    recipe: Mapping[str, object] | str | PathLike[str],
    evaluate: Evaluate | str,
    budget: int = 40,
    *,
    groups: int = 0,
    attention_apart: bool = False,
    direction: str | Sequence[str] = "minimize",
    sampler: str = "auto",
    jobs: int = 1,
    scratch: str | PathLike[str] | None = None,
    data: Sequence[str | PathLike[str]] = (),
    progress: bool | None = None,
    **settings: object,
) -> Tuned:
    """Search settings by evaluating merges, and merge with the best.

    >>> import modelfuse
    >>> modelfuse.tune("recipe.yaml", evaluate=lambda folder: loss_of(folder), budget=40)  # doctest: +SKIP
    <Tuned: value 1.73451 by trial 32 of 40; /…/merged>

    Args:
        recipe: Settings as ``merge`` takes them, or a file of them. Numbers that are marked are searched:
            ``{"weight_list": {"tune": [0, 1.5]}}``; without marks, weights are.
        evaluate: Called with the folder of a merged model, which is there until it returns; gives the loss, or several
            numbers by name. Or a command with ``{model}``, or ``"perplexity"`` of the texts in ``data``.
        budget: How many merges are evaluated in all, those of earlier runs of the same request included.
        groups: Parts of the depth that have weights of their own for each model; 0: none.
        attention_apart: Whether attention and MLP of each part have weights of their own.
        direction: ``"minimize"`` or ``"maximize"``; ``["accuracy=maximize"]`` for one of several numbers.
        sampler: ``"cmaes"``, ``"tpe"``, ``"gradient"`` (weights of linear merges, with perplexity), or ``"auto"``.
        jobs: How many evaluations run at a time, each in a thread.
        scratch: A folder for merges while they are evaluated; None: a RAM disk if they fit, else beside the study.
        data: Files of texts for ``"perplexity"``.
        progress: Whether to tell of each trial; None: on a terminal and in a notebook.
        settings: Override those of the recipe, such as ``output_path``.

    Returns:
        The best trial, and where its merge and the study are.

    Raises:
        ModelfuseError: If the request is wrong, or a merge or an evaluation fails. What was found is kept in
            ``OUTPUT.tune``, and the same call resumes from there.
    """
    given = by_canonical_name(settings)
    if isinstance(recipe, Mapping):
        name_hosts(recipe.values())
        given = {**by_canonical_name(recipe), **given}
    else:
        name_hosts([recipe])
        own = by_canonical_name(load_recipe(Path(recipe)))
        given = {**without_hosts(f"The recipe {Path(recipe)}", own, given), **given}
    name_hosts(settings.values())
    files = [Path(each) for each in data]
    request = TuningRequest(
        given,
        evaluation_of(evaluate, files) if isinstance(evaluate, str) else Function(evaluate),
        budget,
        groups,
        attention_apart,
        [direction] if isinstance(direction, str) else [*direction],
        sampler,
        jobs,
        None if scratch is None else Path(scratch),
    )
    return run_request(request, tell_of(progress), QUIET if progress is False else None)
