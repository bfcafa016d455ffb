"""``modelfuse.merge``, ``check``, ``diff``, ``inspect``, ``verify`` and ``register``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, Unpack

from modelfuse.api.keywords import Keywords
from modelfuse.api.signatures import describe, with_settings
from modelfuse.cli import progress as shown
from modelfuse.cli.console import err
from modelfuse.cli.drawing import Drawing
from modelfuse.execution.intermediate import keep_intermediate
from modelfuse.execution.result import Result
from modelfuse.execution.run import run_plan
from modelfuse.inspection.diff import diff_named
from modelfuse.inspection.diff_result import Diff
from modelfuse.inspection.inspect_model import inspect_named
from modelfuse.inspection.inspected_model import Inspection
from modelfuse.inspection.verify import Verification, verify_output
from modelfuse.kernels.jit.compile import announcing
from modelfuse.methods.spec import Method
from modelfuse.planning.diff_plan import DiffPlan
from modelfuse.planning.hub import QUIET, fetch, headers
from modelfuse.planning.output_location import check_disk_space
from modelfuse.planning.plan import Plan, make_plan
from modelfuse.recipe.installed_methods import register_all
from modelfuse.recipe.names import renew
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import PathOrUrl, path_or_url
from modelfuse.storage.named_hosts import name_hosts

Count = Callable[[int], None]
Tell = Callable[[str], None]


@with_settings
def merge(
    *,
    progress: Count | bool | None = None,
    html: str | os.PathLike[str] | None = None,
    **settings: Unpack[Keywords],
) -> Result:
    """Merge models into a new folder.

    >>> import modelfuse
    >>> modelfuse.merge(model_path_list=["a", "b"], output_path="c", merge_method="linear")  # doctest: +SKIP
    <Result: merged 291 tensors, copied 0 in 9.8 s; /…/c>

    Args:
        progress: Whether to show notes and progress; None: on a terminal and in a notebook. Or a function that is
            called with the bytes done since the last call, from worker threads.
        html: The file of a page that shows what was kept of each model, and where, from a sample of the elements.
            :func:`report` and :func:`draw` make the same page from all elements.

    Returns:
        The path of the output, and numbers about the merge.

    Raises:
        ModelfuseError: If the merge fails; ``output_path`` is then as it was before. If the disk was full or failed,
            finished work is kept beside it, and the same call resumes from there.
    """
    page = None if html is None else Path(html)
    Drawing(page).check()
    name_hosts(settings.values())
    recipe = fetch(Recipe.parse(settings), QUIET if progress is False else None)
    keep_intermediate(recipe)
    plan = make_plan(recipe)
    with _merging(plan, progress) as (advance, tell):
        result = run_plan(plan, advance, tell)
    if page is None:
        return result
    from modelfuse.inspection.pictures.merge_page import write_merge_page

    write_merge_page(recipe, result.output_path, page)
    return replace(result, html=page)


@with_settings
def check(**settings: Unpack[Keywords]) -> Plan:
    """Plan a merge from the checkpoints' headers; no tensor data is read, and nothing is written.

    Returns:
        The plan: what will be merged, copied and left out, with the expected memory and I/O. Its tensors cannot be read
        if models on a hub are not in the cache, as only headers are fetched.

    Raises:
        ModelfuseError: As :func:`merge` would, before any work.
    """
    name_hosts(settings.values())
    with headers(Recipe.parse(settings)) as recipe:
        plan = make_plan(recipe)
    check_disk_space(plan.recipe.output_path, plan.disk_space)
    return plan


def diff(
    *models: PathOrUrl | str,
    base: PathOrUrl | str | None = None,
    exact: bool = False,
    n_process: int | None = None,
    memory: int | str | None = None,
    merge_prefix: str | None = None,
    input_layout: Sequence[str] | None = None,
    merge_with_qdq_base_model: bool = False,
    hub_endpoint: str | None = None,
    hub_anonymous: bool = False,
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    ray_timeout: float = 30.0,
    progress: Callable[[int, int], None] | bool | None = None,
) -> Diff:
    """Compare models with a base and with each other, by tensor: how much they differ, where, and which may interfere.

    >>> found = diff("a", "b", base="base")  # doctest: +SKIP
    >>> found.whole.pair(0, 1).interference  # doctest: +SKIP
    0.8

    Args:
        models: Folders, weight files, URLs, hub names, or adapters of the base.
        base: The model that differences are taken to; by default the first model.
        exact: Compute interference without sketches, which is much slower and needs memory for whole matrices.
        n_process: Parallel workers; by default one per processor.
        memory: The memory budget, as for a merge.
        merge_prefix: Which weights of a folder: ``model`` (default) or ``master_weights``.
        input_layout: ``hf`` or ``paddle``: one for all, or one per model with the base's last.
        merge_with_qdq_base_model: Quantize and dequantize the base first, as in the training of quantized adapters.
        hub_endpoint: The URL of the hub; by default HF_ENDPOINT, else huggingface.co.
        hub_anonymous: Send no token.
        engine: ``ray``: measure on the nodes of a Ray cluster, which must see all models.
        ray_address: The cluster, ``HOST:PORT``; by default as ``ray.init`` finds it.
        ray_timeout: Seconds to wait for the cluster.
        progress: Whether to show progress; None: on a terminal and in a notebook. Or a function that is called with
            the bytes read since the last call and the total, from worker threads.

    Returns:
        The measures by tensor, layer, module and model; see ``docs/diff.md``.

    Raises:
        ModelfuseError: If there are too few models, one cannot be read, or there is nothing to compare.
    """
    name_hosts([*models, base])
    given = {"n_process": n_process, "memory": memory, "merge_prefix": merge_prefix, "input_layout": input_layout,
             "merge_with_qdq_base_model": merge_with_qdq_base_model, "hub_endpoint": hub_endpoint,
             "hub_anonymous": hub_anonymous, "engine": engine, "ray_address": ray_address,
             "ray_timeout": ray_timeout}  # fmt: skip
    settings = {name: value for name, value in given.items() if value is not None}
    shown_by = showing_comparison(progress)
    return diff_named(models, base, exact, settings, shown_by, QUIET if progress is False else None)


def register(*methods: Method) -> None:
    """Register methods by name, for ``merge_method`` in this process.

    >>> from modelfuse.methods.expressions import total
    >>> from modelfuse.methods.spec import Combination, Method
    >>> plain_sum = Combination("plain_sum", "The sum of the models.", "Σ xᵢ", combine=lambda each: total(each.x))
    >>> register(Method("plain_sum", plain_sum))  # doctest: +SKIP

    A package can register methods for every process, including the command line, by an entry point in the group
    ``modelfuse.methods``.

    Args:
        methods: Declarations; see ``docs/adding_a_method.md``.

    Raises:
        RecipeError: If a name is already in use.
    """
    register_all(methods)
    renew()
    describe()


def inspect(
    model: PathOrUrl | str,
    *,
    merge_prefix: str | None = None,
    hub_endpoint: str | None = None,
    hub_anonymous: bool = False,
) -> Inspection:
    """Inspect a model, from the headers of its files only.

    >>> inspect("a")  # doctest: +SKIP
    <Inspection of a: LlamaForCausalLM, 291 tensors, 6,738,415,616 parameters, 13.5 GB in 3 files>

    Args:
        model: A folder, weight file, URL or hub name of a model or an adapter.
        merge_prefix: Which weights of a folder: ``model`` (default) or ``master_weights``.
        hub_endpoint: The URL of the hub; by default HF_ENDPOINT, else huggingface.co.
        hub_anonymous: Send no token.

    Returns:
        Its modules, dtypes, layout, ties and configuration, and obstacles to a merge.

    Raises:
        ModelfuseError: If the model does not exist, or its files cannot be read.
    """
    name_hosts([model])
    return inspect_named(
        model, merge_prefix=merge_prefix, hub_endpoint=hub_endpoint, hub_anonymous=hub_anonymous, watch=QUIET
    )


def verify(
    path: PathOrUrl | str,
    full: bool = False,
    *,
    sample: int | None = None,
    n_process: int | None = None,
    seed: int | None = None,
    hub_endpoint: str | None = None,
    hub_anonymous: bool = False,
    progress: Callable[[int, int], None] | bool | None = None,
) -> Verification:
    """Check that an output is unchanged since its merge, and that merging the inputs again gives the same.

    >>> verify("c").holds  # doctest: +SKIP
    True

    Args:
        path: The output of a merge.
        full: Merge all tensors again instead of a sample, also from inputs in stores and on a hub. A missing input is
            then a problem.
        sample: The number of tensors to merge again; by default as many as read and compare about 256 MB.
        n_process: Parallel workers; by default one per processor, up to eight.
        seed: The seed of the sample; random by default.
        hub_endpoint: The URL of the hub to fetch models from, with ``full``; the one in the output's files is not used.
        hub_anonymous: Send no token, and also fetch from a hub that only the output's files name.
        progress: Whether to show progress; None: on a terminal and in a notebook. Or a function that is called with
            the bytes done since the last call and the total, from worker threads.

    Returns:
        What was checked, and all problems.

    Raises:
        CheckpointError: If the folder is not the output of a merge, or its report is invalid.
        RecipeError: If a number is out of range.
    """
    name_hosts([path])
    folder = path_or_url(path)
    with shown.verifying(folder, not _shows(progress)) as advance, announcing(tell_of(progress)):
        return verify_output(
            folder,
            full=full,
            sample=sample,
            n_process=n_process,
            seed=seed,
            hub_endpoint=hub_endpoint,
            hub_anonymous=hub_anonymous,
            progress=progress if callable(progress) else advance,
        )


def showing_comparison(
    progress: Callable[[int, int], None] | bool | None,
) -> Callable[[DiffPlan], AbstractContextManager[Callable[[int, int], None]]]:
    """The function that shows the progress of a comparison, by the argument ``progress``."""

    @contextmanager
    def shown_by(plan: DiffPlan) -> Iterator[Callable[[int, int], None]]:
        with shown.comparing(plan, not _shows(progress)) as advance:
            yield progress if callable(progress) else advance

    return shown_by


@contextmanager
def _merging(plan: Plan, progress: Count | bool | None) -> Iterator[tuple[Count, Tell]]:
    with shown.merging(plan, not _shows(progress), of_recipe=True) as advance:
        yield progress if callable(progress) else advance, tell_of(progress)


def _shows(progress: object) -> bool:
    """Whether to show progress and notes here, by the argument ``progress``."""
    return err.shows_bars if progress is None else progress is True


def tell_of(progress: object) -> Tell:
    """The function that shows notes, by the argument ``progress``."""
    return (lambda text: err.log("note", "{}", text)) if _shows(progress) else lambda _: None
