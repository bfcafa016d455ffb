"""A plan becomes an output folder: workers, buffers, progress. Nothing else is decided here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from modelfuse.checkpoints import CONFIG_FILE, Checkpoint, StoredTensor
from modelfuse.checkpoints.files import SourceFile, read_bytes
from modelfuse.checkpoints.tensors import Frame
from modelfuse.checkpoints.writer import OutputFolder
from modelfuse.checksums import Checksum
from modelfuse.copying import Copy, Difference, compare_procedure, copy_procedure
from modelfuse.errors import CheckpointError, MismatchError, OutputError
from modelfuse.kernels import Bytes, Pass, Procedure, Work
from modelfuse.memory import SPAN
from modelfuse.plan import OutputTensor, Plan
from modelfuse.report import Outcome, write_config, write_index, write_report
from modelfuse.scheduler import Job, Scheduler

Progress = Callable[[int], None]
#: Differing tensors that an error lists.
MOST_LINES = 20


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
    """

    output_path: Path
    merged: int
    copied: int
    bytes_read: int
    bytes_written: int
    seconds: float


@dataclass(eq=False)
class Task:
    """What a worker needs to know of a job: the tensors to read, and where the result goes, if anywhere."""

    name: str
    sources: tuple[StoredTensor, ...]
    models: tuple[Path, ...]
    outcome: Outcome | None = None
    strict: bool = True


class Sink(Protocol):
    """Where the weight files go: a folder to write, or one to compare with."""

    def create(self, name: str, frame: Frame) -> None:
        """Begin a file; once for each, before anything is written to it."""

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Take bytes of a file; safe from any thread."""


@dataclass
class Run:
    """One run of a plan.

    Args:
        plan: What to do.
        progress: Called with a number of bytes as they are done.
    """

    plan: Plan
    progress: Progress
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    untied: list[Difference] = field(default_factory=list)

    def __post_init__(self) -> None:
        widest = max(len(tensor.sources) for tensor in self.plan.tensors)
        slices = self.plan.slice_elements
        row = slices * max(source.dtype.bytes for tensor in self.plan.tensors for source in tensor.sources)
        column = slices * max(tensor.dtype.bytes for tensor in self.plan.tensors)
        self._raws: list[Bytes] = [np.empty((widest, row), np.uint8) for _ in range(self.plan.workers)]
        self._outs: list[Bytes] = [np.empty(column, np.uint8) for _ in range(self.plan.workers)]
        #: What each worker's buffers hold: a tensor of one slice is read once, however many passes walk it.
        self._held: list[tuple[Task, int] | None] = [None] * self.plan.workers

    def to_folder(self, folder: Sink) -> None:
        """Compare, copy and merge every tensor into the files of ``folder``."""
        for file in self.plan.files:
            folder.create(file.name, file.frame)
        self._folder = folder
        self._schedule(self._preparing_jobs())
        if self.untied:
            raise _describe_untied(self.untied)
        if self.differences:
            raise _describe(self.differences, self.plan.models)
        self._schedule(self._merging_jobs())

    def _schedule(self, jobs: Iterator[Job[Pass]]) -> None:
        self._scheduler = Scheduler(self._walk, self.plan.workers, SPAN)
        self._scheduler.run(job for job in jobs if job.size)  # Nothing is to be done for a tensor without elements.

    def _preparing_jobs(self) -> Iterator[Job[Pass]]:
        """What can show that the models do not fit comes first: tied tensors and those to be copied."""
        for tied in self.plan.tied:
            for model in self.plan.models:
                pair = (model.tensors.get(tied.name), model.tensors.get(tied.other))
                if pair[0] is not None and pair[1] is not None:
                    task = Task(tied.name, (pair[0], pair[1]), (model.path, model.path))
                    copy = Copy(f"{tied.name} and {tied.other} of {model.path}", None, pair[0].dtype.bytes)
                    procedure = compare_procedure(copy, self.untied)
                    yield Job(task, procedure, pair[0].size)
        for tensor in self.plan.tensors:
            if tensor.action == "copy":
                copy = Copy(tensor.name, tensor.chosen, tensor.dtype.bytes)
                yield self._job(tensor, copy_procedure(copy, self.differences))

    def _merging_jobs(self) -> Iterator[Job[Pass]]:
        from modelfuse.kernels.passes import merge_procedure

        for tensor in self.plan.tensors:
            if tensor.action == "merge":
                dtypes = tuple(source.dtype for source in tensor.sources)
                deltas = tuple(source.is_delta for source in tensor.sources[: len(dtypes) - self.plan.has_base])
                work = Work(
                    tensor.name, tensor.size, dtypes, self.plan.has_base, tensor.dtype, self.plan.method, deltas
                )
                yield self._job(tensor, merge_procedure(work))

    def _job(self, tensor: OutputTensor, procedure: Procedure) -> Job[Pass]:
        outcome = Outcome(tensor, Checksum(tensor.nbytes))
        self.outcomes[tensor.name] = outcome
        strict = tensor.action == "merge" and self.plan.recipe.on_nonfinite == "error"
        paths = tuple(model.path for model in self.plan.models)
        return Job(Task(tensor.name, tensor.sources, paths, outcome, strict), procedure, tensor.size)

    def _walk(self, worker: int, task: Task, pass_: Pass, first: int, count: int) -> Any:
        """One span: read each slice of every source, let the pass work on it, write what it made."""
        raws, out = self._raws[worker][: len(task.sources)], self._outs[worker]
        state = pass_.start()
        with ExitStack() as files:
            readers = [files.enter_context(source.open()) for source in task.sources]
            for start in range(first, first + count, self.plan.slice_elements):
                if self._scheduler.stopping:
                    return None
                length = min(self.plan.slice_elements, first + count - start)
                if self._held[worker] != (task, start):
                    self._held[worker] = None
                    for reader, source, raw in zip(readers, task.sources, raws, strict=True):
                        reader(start, raw[: source.dtype.nbytes(length)].data)
                    self._held[worker] = task, start
                pass_.apply(state, start, length, raws, out)
                if task.strict and state.bad.any():
                    raise _nonfinite(task, state.bad)
                if pass_.writes and task.outcome is not None:
                    self._write(task, task.outcome.tensor, start, length, out)
        if pass_.writes and task.outcome is not None:
            task.outcome.nonfinite.append(state.bad)
        return pass_.finish(state)

    def _write(self, task: Task, tensor: OutputTensor, start: int, length: int, out: Bytes) -> None:
        assert task.outcome is not None
        data = out[: tensor.dtype.nbytes(length)]
        offset = tensor.dtype.nbytes(start)
        task.outcome.checksum.update(offset, data)
        self._folder.write(tensor.file, tensor.offset + offset, data.data)
        self.progress(data.size + sum(source.dtype.nbytes(length) for source in task.sources))


def run_plan(plan: Plan, progress: Progress | None = None) -> Result:
    """Carry out a plan.

    Raises:
        CheckpointError: If an input cannot be read, changes meanwhile, or holds NaN or infinities.
        MismatchError: If tensors that cannot be merged differ between the models.
        OutputError: If the output cannot be written.
    """
    started = time.perf_counter()
    if plan.recipe.output_path is None:
        raise OutputError("output_path is not given", "Name the folder to create with --output_path.")
    run = Run(plan, progress or (lambda _: None))
    with OutputFolder(plan.recipe.output_path, plan.recipe.overwrite) as folder:
        run.to_folder(folder)
        for file in plan.side_files:
            source = SourceFile.at(file.source)
            content = read_bytes(source, 0, source.size)
            if file.name == CONFIG_FILE:
                content = plan.format.config(content, plan.recipe.output_dtype)
            folder.write_file(file.name, content)
        write_index(plan, folder)
        write_config(plan, folder)
        write_report(plan, run.outcomes, folder)
        folder.commit()
    merged = sum(tensor.action == "merge" for tensor in plan.tensors)
    return Result(
        plan.recipe.output_path,
        merged,
        len(plan.tensors) - merged,
        plan.bytes_read,
        plan.bytes_written,
        time.perf_counter() - started,
    )


def _nonfinite(task: Task, bad: np.ndarray[Any, np.dtype[np.int64]]) -> CheckpointError:
    hint = "Use --on_nonfinite propagate to let such values through."
    for path, count in zip(task.models, bad, strict=False):
        if count:
            return CheckpointError(
                f"Tensor {task.name!r} of {path} holds NaN or infinite values ({count:,} in the part read so far)", hint
            )
    return CheckpointError(
        f"The merged tensor {task.name!r} overflows its output dtype in {bad[-1]:,} elements of the part done so far",
        "Use a wider --output_dtype, or --on_nonfinite propagate to store infinities.",
    )


def _describe_untied(differences: Sequence[Difference]) -> MismatchError:
    return MismatchError(
        "config.json ties these tensors, but their values differ:\n" + _listed(each.name for each in differences),
        "Set tie_word_embeddings to false there if they are meant to differ.",
    )


def _describe(differences: Sequence[Difference], models: Sequence[Checkpoint]) -> MismatchError:
    lines = (
        f"{each.name} of {models[0].path} is not that of {' and '.join(str(models[at].path) for at in each.sources)}"
        for each in differences
    )
    return MismatchError(
        "These tensors cannot be merged, only copied, but they differ:\n" + _listed(lines),
        "Say which model to take them from with --unmerged_from PATH.",
    )


def _listed(lines: Iterable[str]) -> str:
    """Lines in an order that does not depend on workers, the first ones only."""
    lines = sorted(lines)
    more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return "\n".join(f"  {line}" for line in [*lines[:MOST_LINES], *more])
