"""``modelfuse.tune``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path

from modelfuse.api.functions import tell_of
from modelfuse.cli.tune_command import evaluation_of
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
    """Search settings by evaluating merges, and write the best merge.

    >>> import modelfuse
    >>> modelfuse.tune("recipe.yaml", evaluate=lambda folder: loss_of(folder), budget=40)  # doctest: +SKIP
    <Tuned: value 1.73451 by trial 32 of 40; /…/merged>

    Args:
        recipe: Settings as for ``merge``, or the path of a recipe. Marked numbers are searched, as in
            ``{"weight_list": {"tune": [0, 1.5]}}``; without marks, the weights are.
        evaluate: A function that is called with the folder of a merged model, which is removed afterwards, and returns
            the loss, or several numbers by name. Or a command with ``{model}``, or ``"perplexity"`` of ``data``.
        budget: The number of merges to evaluate, including those of earlier runs of the same request.
        groups: The number of groups of layers with separate weights; 0: one weight per model.
        attention_apart: Whether attention and MLP of each group have separate weights.
        direction: ``"minimize"`` or ``"maximize"``; ``["accuracy=maximize"]`` for one of several numbers.
        sampler: ``"cmaes"``, ``"tpe"``, ``"gradient"`` (weights of linear merges, with perplexity), or ``"auto"``.
        jobs: The number of concurrent evaluations, each in a thread.
        scratch: The folder of merges while they are evaluated; None: a RAM disk if they fit, else beside the study.
        data: Files of texts for ``"perplexity"``.
        progress: Whether to print each trial; None: on a terminal and in a notebook.
        settings: Settings that override the recipe's, such as ``output_path``.

    Returns:
        The best trial, and the paths of its merge and of the study.

    Raises:
        ModelfuseError: If the request is invalid, or a merge or an evaluation fails. Finished trials are kept in
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
