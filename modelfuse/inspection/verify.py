"""Verify that an output is as its merge wrote it, and that the inputs give it: ``modelfuse verify``.

Checks that need no inputs come first: the report's own checksum, files, headers, index, config.json, and the checksum
of every tensor. If the inputs are available, tensors are merged again and compared byte by byte.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.made_files import CONFIG_NAME
from modelfuse.errors import CheckpointError, ModelfuseError, RecipeError
from modelfuse.execution.scheduler import Job, Scheduler
from modelfuse.inspection.output_checks import OutputContents
from modelfuse.inspection.recompute import (
    absent_inputs,
    bytes_of,
    choose,
    compare,
    in_stores,
    modified_inputs,
    plan_again,
)
from modelfuse.inspection.report_reader import Problem, Report, read_recipe, read_report
from modelfuse.planning.memory_budget import processors
from modelfuse.planning.plan import Plan
from modelfuse.planning.tables import html
from modelfuse.recipe.hosts_in_files import without_hosts
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import PathOrUrl, forget
from modelfuse.storage.checksums import BLOCK_BYTES, Checksum
from modelfuse.storage.named_hosts import hosts_of

#: Called with the bytes processed since the last call, and the bytes to process in total.
Progress = Callable[[int, int], None]
#: More threads do not read faster.
MOST_WORKERS = 8
#: Bytes that a worker reads at a time, which fit its cache; bytes of a span.
READ_BYTES = 4 * BLOCK_BYTES
SPAN_BYTES = 32 * BLOCK_BYTES


@dataclass(frozen=True, slots=True, repr=False)
class Verification:
    """The result of :func:`modelfuse.verify`.

    Attributes:
        path: The output.
        files: Number of its weight files.
        tensors: Number of tensors whose checksums were compared.
        recomputed: Number of tensors that were merged again and compared byte by byte.
        seed: The seed of the random sample of those tensors.
        absent: Inputs that are missing or have changed; if there are any, nothing was merged again.
        problems: The checks that failed; empty if all hold.
        nbytes: Bytes read.
        seconds: Wall time.
    """

    path: PathOrUrl
    files: int
    tensors: int
    recomputed: int
    seed: int
    absent: tuple[str, ...]
    problems: tuple[Problem, ...]
    nbytes: int
    seconds: float

    def __repr__(self) -> str:
        found = "holds" if self.holds else f"{len(self.problems)} problems"
        return f"<Verification: {found}; {self.tensors} tensors, {self.recomputed} merged again; {self.path}>"

    def _repr_html_(self) -> str:
        numbers = (("holds", self.holds), ("tensors", self.tensors), ("merged again", self.recomputed),
                   ("seconds", f"{self.seconds:.1f}"))  # fmt: skip
        problems = (("kind", "problem"), [(each.kind, each.message) for each in self.problems])
        row = [value for _, value in numbers]
        return html(str(self.path), ([name for name, _ in numbers], [row]), *([problems] if self.problems else []))

    @property
    def holds(self) -> bool:
        """Whether no problem was found."""
        return not self.problems


def verify_output(
    path: PathOrUrl,
    *,
    full: bool = False,
    sample: int | None = None,
    n_process: int | None = None,
    seed: int | None = None,
    hub_endpoint: str | None = None,
    hub_anonymous: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Verify an output; see :func:`modelfuse.verify`.

    Args:
        path: The folder of the output.
        full: Whether to merge all tensors again, and to access stores and hubs for that.
        sample: The number of tensors to merge again otherwise; None: by their bytes.
        n_process: The number of threads; None: one per processor.
        seed: Determines the sample; None: random.
        hub_endpoint: The URL of the hub.
        hub_anonymous: Whether to send no token to the hub.
        progress: Called as bytes are processed.
        tell: Called with a sentence before stores are accessed.

    Raises:
        RecipeError: If a number is too small.
        CheckpointError: If the folder is not an output of modelfuse, or its report is invalid.
    """
    started = time.perf_counter()
    forget()
    for name, number, least in (("sample", sample, 1), ("n_process", n_process, 1), ("seed", seed, 0)):
        if number is not None and number < least:
            raise RecipeError(f"{name} is {number}: it should be at least {least}")
    workers = min(n_process or processors(), MOST_WORKERS)
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    try:
        report, problems = read_report(path)
        contents = OutputContents(path, report)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: {error.strerror}") from error
    stored = contents.tensors
    problems += contents.problems
    hub: dict[str, object] = {"hub_endpoint": hub_endpoint, "hub_anonymous": hub_anonymous}
    plan, absent, found = _plan(contents, full, sample, seed, workers, hub, tell)
    problems += found
    again = plan.tensors if plan is not None else ()
    whole = sum(each.nbytes for each in stored.values()) + sum(bytes_of(each) for each in again)
    advance = (lambda count: progress(count, whole)) if progress is not None else lambda _: None
    problems += Checksums(report, stored, workers, advance).compare()
    if plan is not None:
        problems += _with_modified_inputs(compare(plan, stored, advance), report)
    seconds = time.perf_counter() - started
    return Verification(
        path, len(contents.files), len(stored), len(again), seed, tuple(absent), tuple(problems), whole, seconds
    )


def _plan(
    contents: OutputContents,
    full: bool,
    sample: int | None,
    seed: int,
    workers: int,
    hub: Mapping[str, object],
    tell: Callable[[str], None],
) -> tuple[Plan | None, list[str], list[Problem]]:
    """The plan of the tensors to merge again, the inputs that are absent, and the problems found so far."""
    report = contents.report
    recipe, problems = read_recipe(contents.folder, report)
    absent: list[str] = []
    if recipe is not None and recipe.hub_names:
        recipe, absent = _from_cache(recipe, full, hub)
    if urls := in_stores(report, recipe):
        if not full:
            return None, [*absent, *(f"{url} is in a store, which only --full accesses" for url in urls)], problems
        tell(f"Reading inputs from {', '.join(hosts_of(urls))}, as the files of {contents.folder} say.")
    absent = absent or absent_inputs(report, recipe)
    if absent:
        problems += [Problem("inputs", f"Not all can be merged again: {each}") for each in absent if full]
        return None, absent, problems
    if recipe is None:
        return None, [], problems
    plan, found = plan_again(recipe, report, workers)
    problems += found
    return plan and choose(plan, contents.tensors, full, sample, seed), [], problems


def _from_cache(recipe: Recipe, full: bool, hub: Mapping[str, object]) -> tuple[Recipe, list[str]]:
    """The recipe with models from the hub's cache, and the errors; only with ``full`` are missing ones downloaded."""
    from modelfuse.planning.hub import QUIET, fetch

    refused: list[str] = []
    try:
        hub = {**hub, **without_hosts(CONFIG_NAME, {"hub_endpoint": recipe.hub_endpoint}, hub)}
    except RecipeError as error:
        refused = [f"{error.message}. {error.hint}"]
    try:
        return fetch(recipe.changed(output_path=None, **hub), QUIET, ask=full and not refused), []
    except ModelfuseError as error:
        return recipe, [error.message, *(refused if full else ())]


def _with_modified_inputs(problems: list[Problem], report: Report) -> list[Problem]:
    """The problems of a comparison and, if there are any, the inputs that may have changed since the merge."""
    if problems and (modified := modified_inputs(report)):
        problems.append(Problem("inputs", f"Modified since the merge: {', '.join(modified)}"))
    return problems


@dataclass
class Checksums:
    """Compares the checksum of every tensor with the reported one.

    Args:
        report: The expected checksums.
        stored: The tensors of the output by name.
        workers: The number of threads.
        progress: Called with the number of bytes processed since the last call.
        found: The problems by the name of the tensor.
    """

    report: Report
    stored: Mapping[str, StoredTensor]
    workers: int
    progress: Callable[[int], None]
    found: dict[str, Problem] = field(default_factory=dict)

    def compare(self) -> list[Problem]:
        """Read every tensor once."""
        self._owners = {entry.checksum: name for name, entry in self.report.tensors.items()}
        self._buffers = [np.empty(READ_BYTES, np.uint8) for _ in range(self.workers)]
        scheduler = Scheduler(self._walk, self.workers, SPAN_BYTES)
        scheduler.run(self._jobs())
        return [self.found[name] for name in self.stored if name in self.found]

    def _jobs(self) -> Iterator[Job[Checksum]]:
        for stored in self.stored.values():
            if stored.nbytes:
                yield Job(stored, self._procedure(stored), stored.nbytes)
            else:
                self._check(stored, Checksum(0))

    def _procedure(self, stored: StoredTensor) -> Generator[Checksum, list[Any], None]:
        """One pass, which updates the checksum; the finding of a span is None, or why it cannot be read."""
        checksum = Checksum(stored.nbytes)
        failures = yield checksum
        if failure := next(filter(None, failures), None):
            message = f"{stored.name} cannot be read: {failure}"
            self.found[stored.name] = Problem("tensor", message, stored.name, stored.file.path.name)
        else:
            self._check(stored, checksum)

    def _walk(self, worker: int, stored: StoredTensor, checksum: Checksum, first: int, count: int) -> str | None:
        try:
            with stored.file.open() as file:
                file.expect(stored.offset + first, count)
                for start in range(first, first + count, READ_BYTES):
                    buffer = self._buffers[worker][: min(READ_BYTES, first + count - start)]
                    file.read(stored.offset + start, buffer.data)
                    checksum.update(start, buffer)
                    self.progress(buffer.size)
        except CheckpointError as error:
            return error.message
        return None

    def _check(self, stored: StoredTensor, checksum: Checksum) -> None:
        digest, file = checksum.hexdigest(), stored.file.path.name
        wanted = self.report.tensors[stored.name].checksum
        if digest == wanted:
            return
        owner = self._owners.get(digest)
        what = f"its checksum is {digest}, reported is {wanted}" if owner is None else f"they are those of {owner}"
        message = f"{stored.name} in {file} does not have the bytes that were merged: {what}"
        self.found[stored.name] = Problem("checksum", message, stored.name, file)
