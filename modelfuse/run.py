"""A plan becomes an output folder: workers, buffers, progress. Nothing else is decided here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from modelfuse.ahead import Ahead
from modelfuse.checkpoints import CONFIG_FILE
from modelfuse.checkpoints.files import read_whole
from modelfuse.checkpoints.tensors import Frame
from modelfuse.checkpoints.writer import OutputFolder
from modelfuse.checksums import Checksum
from modelfuse.copying import Copy, Difference, compare_procedure, copy_procedure
from modelfuse.errors import OutputError
from modelfuse.kernels import Bytes, Pass, Procedure, Work
from modelfuse.kernels.choice import choose
from modelfuse.memory import SPAN, reads_twice
from modelfuse.methods import Method
from modelfuse.places import check_room
from modelfuse.plan import Action, OutputTensor, Plan
from modelfuse.report import Outcome, write_config, write_index, write_report
from modelfuse.resuming import Finished, bytes_of, entry_of, facts_of
from modelfuse.scheduler import Job, Scheduler
from modelfuse.storage import Place, Url, waiting_while
from modelfuse.streaming import Sources, Streaming
from modelfuse.suspicious import Suspicious, find_suspicious
from modelfuse.unequal import describe_copies, describe_twins
from modelfuse.walking import Room, Task, Walker

if TYPE_CHECKING:
    from modelfuse.checkpoints.remote_writer import Output

Progress = Callable[[int], None]
#: What is taken from one input is multiplied by one.
TAKE = Method("linear", None, (1.0,))


@dataclass(frozen=True, slots=True)
class Result:
    """What a merge did.

    Attributes:
        output_path: Where the merged model is.
        merged: Tensors merged.
        copied: Tensors copied.
        bytes_read: Bytes of the inputs' tensors.
        bytes_written: Bytes of the weight files.
        seconds: Wall time.
        bytes_kept: Bytes, read and written, that an earlier run of the same request had done.
        suspicious: The models with tensors that equal the base's, or are far from it.
    """

    output_path: Place
    merged: int
    copied: int
    bytes_read: int
    bytes_written: int
    seconds: float
    bytes_kept: int = 0
    suspicious: tuple[Suspicious, ...] = ()


class Sink(Protocol):
    """Where the weight files go: a folder to write, or one to compare with."""

    def create(self, name: str, frame: Frame) -> None:
        """Begin a file; once for each, before anything is written to it."""

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Take bytes of a file; safe from any thread."""

    def keep(self, name: str, nbytes: int, entry: object) -> None:
        """Take note that so many bytes of a file are finished; safe from any thread."""


@dataclass
class Run:
    """One run of a plan.

    Args:
        plan: What to do.
        progress: Called with a number of bytes as they are done.
    """

    plan: Plan
    progress: Progress
    differences: list[Difference] = field(default_factory=list)
    untied: list[Difference] = field(default_factory=list)
    strange: list[Difference] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.finished = Finished(self.plan)
        self._ahead = self._sent_ahead() if self.plan.fetched else None
        self._kernel = choose(self.plan.device)
        room = Room.of(self.plan)
        self._walkers = [Walker(self._kernel, room, self._is_stopping) for _ in range(self.plan.workers)]
        self.outcomes = {tensor.name: Outcome(tensor, Checksum(tensor.nbytes)) for tensor in self.plan.tensors}

    def take_up(self, entries: Iterable[object]) -> None:
        """Go on from what earlier runs have finished: what their sinks were told to keep."""
        self.finished.restore(entries, self.outcomes)
        if self.finished.nbytes:
            self.progress(self.finished.nbytes)

    def to_folder(self, folder: Sink) -> None:
        """Compare, copy and merge every tensor into the files of ``folder``."""
        for file in self.plan.files:
            folder.create(file.name, file.frame)
        self._folder = folder
        self._schedule(self._preparing_jobs(), ())
        if self.untied:
            what = "config.json ties these tensors, but their values differ"
            raise describe_twins(
                self.untied, what, "Set tie_word_embeddings to false there if they are meant to differ."
            )
        if self.strange:
            what = "The adapter has copies of tensors of its base, but they are not equal"
            raise describe_twins(self.strange, what, "Give the base that the adapter was trained on.")
        if self.differences:
            raise describe_copies(self.differences, self.plan.models)
        with self._kernel.running():
            order = (tensor.sources for tensor in self._unfinished("merge", "take"))
            self._schedule(self._merging_jobs(), order)

    def _schedule(self, jobs: Iterator[Job[Pass]], order: Iterable[Sources]) -> None:
        self._scheduler = Scheduler(self._walk, self.plan.workers, SPAN)
        self._streaming = Streaming(order)
        try:
            with waiting_while(lambda: not self._scheduler.stopping):
                self._scheduler.run(jobs)
        finally:
            self._streaming.end()

    def _sent_ahead(self) -> Ahead:
        """The first bytes come while kernels are loaded."""
        from modelfuse.storage.ranges import RANGES

        RANGES.room, RANGES.keeps = self.plan.fetched, reads_twice(self.plan.recipe)
        ahead = Ahead(self._in_order())
        ahead.send()
        return ahead

    def _in_order(self) -> Iterator[Sources]:
        """The sources of all tensors in the order of the jobs."""
        yield from ((pair.one, pair.other) for pair in self.plan.twins if pair.one.size)
        yield from (tensor.sources for tensor in self._unfinished("copy"))
        yield from (tensor.sources for tensor in self._unfinished("merge", "take"))

    def _preparing_jobs(self) -> Iterator[Job[Pass]]:
        """What can show that the models do not fit comes first: tied tensors and those to be copied."""
        for pair in self.plan.twins:
            if pair.one.size:
                task = Task((pair.one, pair.other), (pair.path, pair.path))
                copy = Copy(f"{pair.one.name} and {pair.other.name} of {pair.path}", None, pair.one.dtype.bytes)
                procedure = compare_procedure(copy, self.untied if pair.tied else self.strange)
                yield Job(task, procedure, pair.one.size)
        for tensor in self._unfinished("copy"):
            copy = Copy(tensor.name, tensor.chosen, tensor.dtype.bytes)
            yield self._job(tensor, copy_procedure(copy, self.differences))

    def _merging_jobs(self) -> Iterator[Job[Pass]]:
        for tensor in self._unfinished("merge", "take"):
            merges = tensor.action == "merge"
            has_base, method = merges and self.plan.has_base, self.plan.method if merges else TAKE
            dtypes = tuple(source.dtype for source in tensor.sources)
            deltas = tuple(source.is_delta for source in tensor.sources[: len(dtypes) - has_base])
            work = Work(tensor.name, tensor.size, dtypes, has_base, tensor.dtype, method, deltas)
            procedure = self._kernel.merge(work)
            if work.has_base:
                from modelfuse.kernels.distances import measured

                procedure = measured(procedure, work)
            yield self._job(tensor, procedure)

    def _unfinished(self, *actions: Action) -> Iterator[OutputTensor]:
        """The tensors to do; nothing is to be done for one without elements."""
        for tensor in self.plan.tensors:
            if tensor.action in actions and not self.finished.has_all(tensor):
                yield tensor

    def _job(self, tensor: OutputTensor, procedure: Procedure) -> Job[Pass]:
        strict = tensor.action != "copy" and self.plan.recipe.on_nonfinite == "error"
        paths = tuple(model.path for model in self.plan.inputs_of(tensor))
        task = Task(tensor.sources, paths, tensor, strict)
        return Job(task, self.outcomes[tensor.name].follow(procedure), tensor.size)

    def _is_stopping(self) -> bool:
        return self._scheduler.stopping

    def _walk(self, worker: int, task: Task, pass_: Pass, first: int, count: int) -> Any:
        """One span; nothing is found in one that an earlier run has written."""
        tensor = task.tensor if pass_.writes else None
        if tensor is not None and self.finished.has(tensor.name, first, count):
            return None
        self._streaming.begin(task, first, count)
        if self._ahead is not None:
            self._ahead.begin(task.sources, first)
        walked = self._walkers[worker].walk(task, pass_, first, count, self._write)
        if tensor is not None:
            self._streaming.passed(task, first, count)
            self.outcomes[tensor.name].take(first, walked)
            if not walked.found:
                self._folder.keep(tensor.file, tensor.dtype.nbytes(count), entry_of(tensor, first, count, walked))
        return walked.found

    def _write(self, tensor: OutputTensor, start: int, data: Bytes) -> None:
        self._folder.write(tensor.file, tensor.offset + tensor.dtype.nbytes(start), data.data)
        self.progress(bytes_of(tensor, data.size // tensor.dtype.bytes))


def _output(plan: Plan, path: Place) -> Output:
    if isinstance(path, Url):
        from modelfuse.checkpoints.remote_writer import RemoteFolder

        return RemoteFolder(path, plan.recipe.overwrite)
    return OutputFolder(path, plan.recipe.overwrite, facts_of(plan))


def run_plan(plan: Plan, progress: Progress | None = None, tell: Callable[[str], None] = lambda _: None) -> Result:
    """Carry out a plan; where an earlier run of it was ended, go on from there.

    Args:
        plan: What to do.
        progress: Called with a number of bytes as they are done; first with those that an earlier run has done.
        tell: Called with a sentence if an earlier run was ended, on what becomes of its work.

    Raises:
        CheckpointError: If an input cannot be read, changes meanwhile, or holds NaN or infinities.
        MismatchError: If tensors that cannot be merged differ between the models.
        OutputError: If the output cannot be written.
    """
    started = time.perf_counter()
    if plan.recipe.output_path is None:
        raise OutputError("output_path is not given", "Name the folder to create with --output_path.")
    check_room(plan.recipe.output_path, plan.room)
    run = Run(plan, progress or (lambda _: None))
    with _output(plan, plan.recipe.output_path) as folder:
        if folder.afresh is not None:
            tell(f"Starting afresh: {folder.afresh}.")
        run.take_up(folder.finished())
        if run.finished.nbytes:
            share = run.finished.nbytes / (plan.bytes_read + plan.bytes_written)
            tell(f"Going on from where the last run was ended: {share:.0%} is done.")
        run.to_folder(folder)
        for file in plan.side_files:
            content = read_whole(file.source)
            if file.name == CONFIG_FILE:
                content = plan.format.config(content, plan.served_dtype, plan.lead.dequantized)
            folder.write_file(file.name, content)
        for name, made in plan.made_files.items():
            folder.write_file(name, made)
        write_index(plan, folder)
        write_config(plan, folder)
        suspicious = find_suspicious(plan, lambda name: run.outcomes[name].measured())
        write_report(plan, run.outcomes, suspicious, folder)
        folder.commit()
    adapts = plan.recipe.output_format == "lora"
    merged = sum(adapts or tensor.action == "merge" for tensor in plan.tensors)
    return Result(
        plan.recipe.output_path,
        merged,
        len(plan.tensors) - merged,
        plan.bytes_read,
        plan.bytes_written,
        time.perf_counter() - started,
        run.finished.nbytes,
        suspicious,
    )
