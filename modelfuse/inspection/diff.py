"""Compare models (``modelfuse diff``): open the inputs, measure every tensor with the workers of a merge, sum up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from msgspec.structs import replace

from modelfuse.checkpoints.adapters import Adapter
from modelfuse.checkpoints.config_differences import config_differences, shown
from modelfuse.errors import RecipeError
from modelfuse.execution.prefetch import Streaming
from modelfuse.execution.report_writer import SpanResult
from modelfuse.execution.scheduler import Job, Scheduler
from modelfuse.execution.worker import BufferSizes, Task, Worker, row_bytes
from modelfuse.inspection.diff_advice import advice_of
from modelfuse.inspection.diff_findings import findings_of
from modelfuse.inspection.diff_result import ComparedTensorFacts, Diff, NotCompared, SideDifference, TensorGroup
from modelfuse.inspection.diff_sums import GroupKey, GroupSums
from modelfuse.kernels import Bytes, Pass
from modelfuse.kernels.adaptive import SMALL
from modelfuse.kernels.backends import Device
from modelfuse.kernels.blas_threads import one_thread
from modelfuse.kernels.differences import DifferenceSums, measure
from modelfuse.kernels.jit.compile import nothing_compiled
from modelfuse.kernels.kernel import CompiledKernel
from modelfuse.planning.diff_plan import ComparedTensor, CutRows, DiffPlan, budget_of, make_diff_plan
from modelfuse.planning.hub import FetchDisplay, fetch
from modelfuse.planning.memory_budget import SPAN
from modelfuse.planning.operations import Operation
from modelfuse.planning.optional_packages import require
from modelfuse.planning.side_file_differences import FolderFiles, processor_and_code_differences, serving_differences
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import configure_cache, waiting_while

Progress = Callable[[int, int], None]


def diff_recipe(models: Sequence[object], base: object | None, settings: Mapping[str, object]) -> Recipe:
    """The recipe of a merge of the same inputs; without a base, the first model is the base.

    Raises:
        RecipeError: If there are too few models, or a setting is wrong.
    """
    if len(models) < 2 - (base is not None):
        raise RecipeError(
            f"diff compares at least two models, or one with a base; {len(models) or 'none'} is given",
            "Give two or more paths: `modelfuse diff A B`, or `modelfuse diff B --base A`.",
        )
    if base is None:
        base, *models = models
        layouts = settings.get("input_layout")
        if isinstance(layouts, list | tuple) and len(layouts) > 1:
            settings = {**settings, "input_layout": [*layouts[1:], layouts[0]]}
    return Recipe.parse({**settings, "model_path_list": [*models], "base_model_path": base})


def diff_named(
    models: Sequence[object],
    base: object | None,
    exact: bool,
    settings: Mapping[str, object],
    shown: Callable[[DiffPlan], AbstractContextManager[Progress]],
    watch: FetchDisplay | None = None,
) -> Diff:
    """Compare models given as folders, files, URLs or hub names.

    Args:
        models: The models.
        base: The model that differences are taken to; None: the first model.
        exact: Whether to compute interference exactly instead of estimating it from a sketch.
        settings: Settings of a merge that concern inputs and the machine.
        shown: Called with the plan; returns a context manager that yields the progress callback.
        watch: Displays the progress of downloads.

    Raises:
        ModelfuseError: If a setting is wrong, an input cannot be read, or there is nothing to compare.
    """
    recipe = diff_recipe(models, base, settings)
    if recipe.engine == "ray":
        require("ray", "engine ray", "compare on this machine with --engine local")

    def check(recipe: Recipe) -> int:
        make_diff_plan(recipe, exact)
        return 0

    plan = make_diff_plan(fetch(recipe, watch, check=check), exact)
    with shown(plan) as advance:
        return carry_out(plan, base is not None, advance)


def carry_out(plan: DiffPlan, base_given: bool, progress: Progress | None = None) -> Diff:
    """Execute a plan.

    Args:
        plan: The tensors to compare.
        base_given: Whether the user named a base; False: the first model is used as one.
        progress: Called with the bytes read since the last call, and the bytes to read in total.

    Raises:
        CheckpointError: If an input cannot be read.
    """
    started = time.perf_counter()
    sums = GroupSums.joined(Measuring(plan, progress or (lambda *_: None)).run())
    return result_of(plan, sums, base_given, plan.bytes_read, started)


def result_of(plan: DiffPlan, sums: GroupSums, base_given: bool, bytes_read: int, started: float) -> Diff:
    """The result of a comparison.

    Args:
        plan: What was compared.
        sums: The sums of each tensor, in the plan's order.
        base_given: Whether the base was given as one.
        bytes_read: The number of bytes that were read.
        started: The start, by ``time.perf_counter``.
    """
    recipe, places = plan.recipe, [each.location for each in plan.tensors]
    inside = np.flatnonzero([each.layer is not None for each in places])
    cells = _groups(sums, [(each.stack, each.layer, each.module) for each in places])
    result = Diff(
        base=str(recipe.inputs[-1]),
        base_given=base_given,
        models=tuple(map(str, recipe.inputs[:-1])),
        whole=_groups(sums, [("", None, None)] * len(places))[0],
        layers=_groups(sums.rows(inside), [(places[each].stack, places[each].layer, None) for each in inside]),
        modules=_groups(sums, [(each.stack, None, each.module) for each in places]),
        cells=cells,
        tensors=_tensors(plan, sums, cells),
        facts=tuple(_facts(each, plan.common_rows.get(each.name)) for each in plan.tensors),
        not_compared=tuple(NotCompared(name, because) for name, because in plan.left_out.items()),
        side_differences=tuple(_side_differences(plan)),
        findings=(),
        exact=plan.exact,
        bytes_read=bytes_read,
        seconds=time.perf_counter() - started,
    )
    adapters = any(isinstance(model, Adapter) for model in plan.models)
    return result.with_findings(findings_of(result), advice_of(result, adapters))


def _groups(sums: GroupSums, places: Sequence[tuple[str, int | None, str | None]]) -> tuple[TensorGroup, ...]:
    """Sum the tensors of the same stack, layer and module; groups are in the order of their first tensor."""
    keys = [GroupKey(_name(*place), *place) for place in dict.fromkeys(places)]
    return sums.added(places).groups(keys) if places else ()


def _tensors(plan: DiffPlan, sums: GroupSums, cells: Sequence[TensorGroup]) -> tuple[TensorGroup, ...]:
    """The group of each tensor. That of a tensor which is alone in its cell is the cell's, with another name."""
    found = {(each.stack, each.layer, each.module): each for each in cells if each.tensors == 1}
    several = [number for number, each in enumerate(plan.tensors) if each.location not in found]
    keys = [GroupKey(plan.tensors[number].name, *plan.tensors[number].location) for number in several]
    own = dict(zip(several, sums.rows(np.array(several)).groups(keys), strict=True)) if several else {}
    return tuple(
        own[number] if number in own else replace(found[each.location], name=each.name)
        for number, each in enumerate(plan.tensors)
    )


def _name(stack: str, layer: int | None, module: str | None) -> str:
    where = f"{stack} " * bool(stack) + (f"layer {layer}" if layer is not None else "")
    return f"{where} {module or ''}".strip() or "model"


def _facts(tensor: ComparedTensor, cut: CutRows | None) -> ComparedTensorFacts:
    base, is_matrix = tensor.sources[-1], tensor.measurement.matrices is not None
    rows, shape = (None, base.shape) if cut is None else cut
    return ComparedTensorFacts(tensor.name, str(base.natural), shape, is_matrix, rows)


class Measuring:
    """A run over a plan's tensors that measures instead of writing.

    Args:
        plan: The tensors to compare.
        progress: Called with the bytes read since the last call, and the bytes to read in total.
    """

    def __init__(self, plan: DiffPlan, progress: Progress) -> None:
        self._plan, self._progress, self._nbytes = plan, progress, plan.bytes_read
        budget, kernel = budget_of(plan), CompiledKernel()
        slices = budget.slice_elements
        rows = max(row_bytes(each.sources, slices) * len(each.sources) for each in plan.tensors)
        configure_cache(budget.fetched, False)
        self._sizes = BufferSizes(slices, rows, 0, budget.fetched, False)
        workers = budget.workers if plan.recipe.engine == "local" else 0
        self._workers = [Worker(kernel, self._sizes, lambda: self._scheduler.stopping) for _ in range(workers)]
        paths = [model.path for model in plan.models]
        self._tasks = [Task(each.sources, tuple(paths[number] for number in each.inputs)) for each in plan.tensors]
        self._sums: list[GroupSums | None] = [None] * len(plan.tensors)
        self._scheduler: Scheduler[Pass] = Scheduler(self._walk, budget.workers, SPAN)

    def run(self) -> list[GroupSums]:
        """Measure all tensors, in the plan's order."""
        if self._plan.recipe.engine == "ray":
            self._run_on_cluster()
        else:
            self._run_here()
        return [each for each in self._sums if each is not None]

    def _run_on_cluster(self) -> None:
        from modelfuse.execution.run import cluster_of

        with cluster_of(self._plan.recipe) as cluster:
            assert cluster is not None
            with cluster.sharing(self._tasks, Device("np"), self._sizes, self._nbytes, None):
                cluster.walk(self._jobs(), SPAN, self)

    def _run_here(self) -> None:
        self._streaming = Streaming(self._tasks)
        # A small comparison takes less time with numpy than the compiler to start; the numbers are the same.
        compiler = nothing_compiled() if self._nbytes < SMALL else nullcontext()
        with compiler, one_thread(), waiting_while(lambda: not self._scheduler.stopping):
            try:
                self._streaming.start()
                self._scheduler.run(self._jobs())
            finally:
                self._streaming.end()

    def _jobs(self) -> Iterator[Job[Pass]]:
        for number, (tensor, task) in enumerate(zip(self._plan.tensors, self._tasks, strict=True)):
            yield Job(task, measure(tensor.measurement, self._keeper(number)), tensor.measurement.size)

    def _keeper(self, number: int) -> Callable[[DifferenceSums], None]:
        tensor = self._plan.tensors[number]

        def keep(found: DifferenceSums) -> None:
            if not self._workers:
                self._progress(tensor.bytes_read, self._nbytes)
            self._sums[number] = GroupSums.of(tensor.measurement.size, found).spread(tensor.models)

        return keep

    def has(self, task: Task, pass_: Pass, first: int, count: int) -> bool:
        """See :class:`ResultSink`: nothing is known from earlier runs."""
        return False

    def may_go_ahead(self) -> bool:
        """See :class:`ResultSink`."""
        return True

    def write(self, tensor: Operation, start: int, data: Bytes) -> None:
        """See :class:`ResultSink`: nothing is written."""

    def advance(self, tensor: Operation, count: int) -> None:
        """See :class:`ResultSink`."""

    def take(self, task: Task, pass_: Pass, first: int, count: int, walked: SpanResult) -> None:
        """See :class:`ResultSink`: only spans that are written have results."""

    def _walk(self, worker: int, task: Task, pass_: Pass, first: int, count: int) -> Any:
        self._streaming.begin(task, first, count)
        walked = self._workers[worker].walk(task, pass_, first, count, lambda *_: None)
        self._streaming.passed(task, first, count)
        self._progress(sum(source.stored.nbytes(count) for source in task.sources), self._nbytes)
        return walked.found


def _side_differences(plan: DiffPlan) -> Iterator[SideDifference]:
    """Differences between the base's and each model's config.json, tokenizer and other files.

    Adapters have no configuration of a model, so only their tokenizer and chat template are compared.
    """
    base, folder = plan.models[-1], FolderFiles.of(plan.recipe.input_paths[-1])
    for number, (model, path) in enumerate(zip(plan.models[:-1], plan.recipe.model_paths, strict=True)):
        is_adapter = isinstance(model, Adapter)
        for each in () if is_adapter else config_differences(base.config, model.config):
            text = f"config.json: {each.key} is {shown(each.one)} in the base, but {shown(each.other)}"
            one, other = (json.dumps(value, default=str) for value in (each.one, each.other))
            yield SideDifference(number, "config", text, each.key, one, other, each.fatal)
        own = FolderFiles.of(path)
        if own.folder == folder.folder:
            continue
        found = [
            *serving_differences(folder, own, "the base"),
            *(() if is_adapter else processor_and_code_differences(folder, own)),
        ]
        yield from (SideDifference(number, each.about, each.text) for each in found)
