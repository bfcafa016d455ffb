"""Execute a plan into an output folder. All decisions were made by the plan."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modelfuse.checkpoints import CONFIG_FILE
from modelfuse.checkpoints.output.atomic_folder import OutputFolder
from modelfuse.errors import OutputError
from modelfuse.execution.anomalies import find_suspicious
from modelfuse.execution.copying import (
    Copy,
    Difference,
    compare_procedure,
    copy_procedure,
    describe_copies,
    describe_unequal_pairs,
)
from modelfuse.execution.prefetch import Streaming
from modelfuse.execution.report_writer import Outcome, SpanResult, write_config, write_index, write_report
from modelfuse.execution.result import Result
from modelfuse.execution.resume import Finished, bytes_of, entry_of, facts_of
from modelfuse.execution.scheduler import Job, Scheduler
from modelfuse.execution.sink import OutputSink, Sink
from modelfuse.execution.worker import BufferSizes, Task, Tasks, Worker
from modelfuse.kernels import Bytes, Pass, Procedure
from modelfuse.kernels.backends import choose
from modelfuse.kernels.jit.compile import announcing
from modelfuse.planning.memory_budget import MOST_WAITING, SPAN
from modelfuse.planning.operations import Action, Operation
from modelfuse.planning.output_location import check_disk_space
from modelfuse.planning.plan import Plan
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import PathOrUrl, Url, configure_cache, waiting_while
from modelfuse.storage.checksums import Checksum
from modelfuse.storage.files import read_whole

if TYPE_CHECKING:
    from modelfuse.checkpoints.output.remote_folder import Output
    from modelfuse.execution.ray.driver import Cluster

Progress = Callable[[int], None]


@dataclass
class Run:
    """One execution of a plan.

    Args:
        plan: The plan.
        progress: Called with the number of bytes that were just done.
        cluster: The Ray cluster to run on; None: threads of this process.
    """

    plan: Plan
    progress: Progress
    cluster: Cluster | None = None
    differences: list[Difference] = field(default_factory=list)
    untied: list[Difference] = field(default_factory=list)
    strange: list[Difference] = field(default_factory=list)

    def __post_init__(self) -> None:
        # The nodes of a cluster compile their own kernels.
        self._kernel = choose(self.plan.device, self.plan.compiler if self.cluster is None else None)
        self._tasks, self._sizes = Tasks.of(self.plan), BufferSizes.of(self.plan)
        configure_cache(self._sizes.fetched, self._sizes.keeps)
        workers = self.plan.workers if self.cluster is None else 0
        self._worker_states = [Worker(self._kernel, self._sizes, self._is_stopping) for _ in range(workers)]
        self.outcomes = {tensor.name: Outcome(tensor, Checksum(tensor.nbytes)) for tensor in self.plan.tensors}
        #: Guards the outcomes: workers finish spans of the same tensor concurrently.
        self._taking = threading.Lock()
        self.finished = Finished(self.plan)

    def take_up(self, entries: Iterable[object]) -> None:
        """Resume from the journal entries of earlier runs."""
        self.finished.restore(entries, self.outcomes)
        if self.finished.nbytes:
            self.progress(self.finished.nbytes)

    def to_folder(self, folder: Sink) -> None:
        """Compare, copy and merge every tensor into the files of ``folder``."""
        for file in self.plan.files:
            folder.create(file.name, file.frame)
        self._folder = folder
        if self.cluster is not None:
            tasks = (*self._tasks.equal_pairs, *self._tasks.tensors)
            nbytes = self.plan.bytes_read + self.plan.bytes_written
            with self.cluster.sharing(tasks, self.plan.device, self._sizes, nbytes, folder.share()):
                self._walk_all()
            return
        self._streaming = Streaming(self._in_order())
        try:
            self._streaming.start()
            self._walk_all()
        finally:
            self._streaming.end()

    def _walk_all(self) -> None:
        with self._kernel.running():
            self._prepare_and_merge()

    def _prepare_and_merge(self) -> None:
        self._schedule(self._preparing_jobs())
        if self.untied:
            what = "config.json ties these tensors, but their values differ"
            raise describe_unequal_pairs(
                self.untied, what, "Set tie_word_embeddings to false there if they are meant to differ."
            )
        if self.strange:
            what = "The adapter has copies of tensors of its base, but they are not equal"
            raise describe_unequal_pairs(self.strange, what, "Give the base that the adapter was trained on.")
        if self.differences:
            raise describe_copies(self.differences)
        self._schedule(self._merging_jobs())

    def _schedule(self, jobs: Iterator[Job[Pass]]) -> None:
        if self.cluster is not None:
            self.cluster.walk(jobs, SPAN, self)
            return
        self._scheduler = Scheduler(self._walk, self.plan.workers, SPAN, self.may_go_ahead)
        with waiting_while(lambda: not self._scheduler.stopping):
            self._scheduler.run(jobs)

    def may_go_ahead(self) -> bool:
        """Whether spans of later tensors may start before the current tensor has ended."""
        return (self._folder.ahead() or 0) <= MOST_WAITING

    def _in_order(self) -> Iterator[Task]:
        """All tasks, in the order of the jobs."""
        yield from (task for task in self._tasks.equal_pairs if task.sources[0].size)
        yield from (task for _, task in self._unfinished("copy"))
        yield from (task for _, task in self._unfinished(*self._made_last))

    @property
    def _made_last(self) -> tuple[Action, ...]:
        """The actions of the second phase, after all comparisons; includes copies where files are written in order."""
        return ("merge", "take") if self._folder.ahead() is None else ("merge", "take", "copy")

    def _preparing_jobs(self) -> Iterator[Job[Pass]]:
        """Comparisons come first, as they can fail the merge: equal pairs, and tensors to be copied."""
        for pair, task in zip(self.plan.equal_pairs, self._tasks.equal_pairs, strict=True):
            if pair.one.size:
                what = f"{pair.one.name} and {pair.other.name} of {pair.path}"
                copy = Copy(what, None, pair.one.dtype.bytes, task.models)
                procedure = compare_procedure(copy, self.untied if pair.tied else self.strange)
                yield Job(task, procedure, pair.one.size)
        for tensor, task in self._unfinished("copy"):
            copy = Copy(tensor.name, tensor.chosen, tensor.dtype.bytes, task.models)
            if "copy" in self._made_last:
                yield Job(task, compare_procedure(copy, self.differences), tensor.size)
            else:
                yield self._job(tensor, task, copy_procedure(copy, self.differences))

    def _merging_jobs(self) -> Iterator[Job[Pass]]:
        for tensor, task in self._unfinished(*self._made_last):
            if tensor.action == "copy":
                copy = Copy(tensor.name, tensor.chosen, tensor.dtype.bytes, task.models)
                yield self._job(tensor, task, copy_procedure(copy, self.differences))
                continue
            work = tensor.work
            procedure = self._kernel.merge(work)
            if work.has_base:
                from modelfuse.kernels.compiled.base_distance import measured

                procedure = measured(procedure, work)
            yield self._job(tensor, task, procedure)

    def _unfinished(self, *actions: Action) -> Iterator[tuple[Operation, Task]]:
        """The tensors with these actions that are not finished; those without elements always are."""
        for tensor, task in zip(self.plan.tensors, self._tasks.tensors, strict=True):
            if tensor.action in actions and not self.finished.has_all(tensor):
                yield tensor, task

    def _job(self, tensor: Operation, task: Task, procedure: Procedure) -> Job[Pass]:
        return Job(task, self.outcomes[tensor.name].follow(procedure), tensor.size)

    def _is_stopping(self) -> bool:
        return self._scheduler.stopping

    def _walk(self, worker: int, task: Task, pass_: Pass, first: int, count: int) -> Any:
        """Process one span on a worker; None for a span that an earlier run has written."""
        if self.has(task, pass_, first, count):
            return None
        self._streaming.begin(task, first, count)
        walked = self._worker_states[worker].walk(task, pass_, first, count, self.write)
        if task.tensor is not None and pass_.writes:
            self._streaming.passed(task, first, count)
        self.take(task, pass_, first, count, walked)
        return walked.found

    def has(self, task: Task, pass_: Pass, first: int, count: int) -> bool:
        return task.tensor is not None and pass_.writes and self.finished.has(task.tensor.name, first, count)

    def write(self, tensor: Operation, start: int, data: Bytes) -> None:
        self._folder.write(tensor.file, tensor.offset + tensor.dtype.nbytes(start), data.data)
        self.advance(tensor, data.size // tensor.dtype.bytes)

    def advance(self, tensor: Operation, count: int) -> None:
        self.progress(bytes_of(tensor, count))

    def take(self, task: Task, pass_: Pass, first: int, count: int, walked: SpanResult) -> None:
        tensor = task.tensor
        if tensor is None or not pass_.writes:
            return
        with self._taking:
            self.outcomes[tensor.name].take(first, walked)
        if not walked.found:
            self._folder.keep(tensor.file, tensor.dtype.nbytes(count), entry_of(tensor, first, count, walked))


def cluster_of(recipe: Recipe) -> AbstractContextManager[Cluster | None]:
    """The Ray cluster that a recipe asks for; None: this machine."""
    if recipe.engine == "local":
        return nullcontext()
    from modelfuse.execution.ray.driver import Cluster

    return Cluster.reached(recipe.ray_address, recipe.ray_timeout)


def _output(plan: Plan, path: PathOrUrl) -> Output:
    if isinstance(path, Url):
        from modelfuse.checkpoints.output.remote_folder import RemoteFolder

        return RemoteFolder(path, plan.recipe.overwrite)
    return OutputFolder(path, plan.recipe.overwrite, facts_of(plan))


def run_plan(plan: Plan, progress: Progress | None = None, tell: Callable[[str], None] = lambda _: None) -> Result:
    """Execute a plan, resuming an earlier run of it that was interrupted.

    Args:
        plan: The plan.
        progress: Called with the number of bytes that were just done; first with those that an earlier run has done.
        tell: Called with notes for the user, one sentence each: whether an earlier run is resumed, and why a first
            merge takes longer.

    Raises:
        CheckpointError: If an input cannot be read, changes during the merge, or has NaN or infinities.
        MismatchError: If tensors that cannot be merged differ between the models.
        OutputError: If the output cannot be written.
        ClusterError: If the Ray cluster cannot be reached, or fails.
    """
    if plan.recipe.output_path is None:
        raise OutputError("output_path is not given", "Name the folder to create with --output_path.")
    check_disk_space(plan.recipe.output_path, plan.disk_space)
    with cluster_of(plan.recipe) as cluster, _output(plan, plan.recipe.output_path) as folder, announcing(tell):
        if folder.restart_reason is not None:
            tell(f"Starting over: {folder.restart_reason}.")
        return run_into(plan, folder, cluster, progress, tell)


def run_into(
    plan: Plan,
    folder: OutputSink,
    cluster: Cluster | None,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Result:
    """Execute a plan into an output that is already open.

    Args:
        plan: The plan.
        folder: Receives the files, and knows what earlier runs have finished.
        cluster: The Ray cluster to run on; None: threads of this process.
        progress: As in :func:`run_plan`.
        tell: As in :func:`run_plan`.

    Raises:
        ModelfuseError: As :func:`run_plan`.
    """
    assert plan.recipe.output_path is not None
    started = time.perf_counter()
    run = Run(plan, progress or (lambda _: None), cluster)
    run.take_up(folder.finished())
    if run.finished.nbytes:
        share = run.finished.nbytes / (plan.bytes_read + plan.bytes_written)
        tell(f"Resuming the interrupted run: {share:.0%} is done.")
    run.to_folder(folder)
    for file in plan.side_files:
        content = read_whole(file.source)
        if file.name == CONFIG_FILE:
            content = plan.config(content)
        folder.write_file(file.name, content)
    for module in plan.modules:
        folder.write_file(module.name, module.content())
    for name, made in plan.made_files.items():
        folder.write_file(name, made)
    write_index(plan, folder)
    write_config(plan, folder)
    suspicious = find_suspicious(plan, lambda name: run.outcomes[name].measured())
    write_report(plan, run.outcomes, suspicious, folder)
    folder.commit()
    return Result(
        plan.recipe.output_path,
        plan.merged,
        len(plan.tensors) - plan.merged,
        plan.bytes_read,
        plan.bytes_written,
        time.perf_counter() - started,
        run.finished.nbytes,
        suspicious,
    )
