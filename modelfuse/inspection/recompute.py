"""Merge tensors again from the inputs, and compare the result with the stored output instead of writing it."""

from __future__ import annotations

import random
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.made_files import CONFIG_NAME, REPORT_NAME
from modelfuse.checkpoints.tensors import Frame
from modelfuse.errors import ModelfuseError
from modelfuse.inspection.report_reader import Problem, Report, ReportedInput
from modelfuse.kernels import Bytes
from modelfuse.kernels.tolerance import apart
from modelfuse.planning.operations import Operation, method_numbers, methods_of
from modelfuse.planning.plan import Plan, make_plan
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import PathOrUrl, Url, exists, folder_of, is_file, look_up, path_or_url, size_of
from modelfuse.storage.files import SourceFile

#: A sample reads and compares at most SAMPLE_BYTES, but has at least SAMPLE_LEAST tensors.
SAMPLE_BYTES = 256_000_000
SAMPLE_LEAST = 4


def in_stores(report: Report, recipe: Recipe | None) -> list[Url]:
    """The inputs that are in stores. They are accessed only on request, as the report may come from anybody."""
    named: list[object] = [path_or_url(model.path) for model in report.read]
    named += [] if recipe is None else [*recipe.inputs, *recipe.gram_list, recipe.tokenizer_from]
    return [*dict.fromkeys(each for each in named if isinstance(each, Url))]


def absent_inputs(report: Report, recipe: Recipe | None) -> list[str]:
    """Input files that are missing or whose size has changed since the merge, as sentences."""
    absent = []
    for model, path in _locations(report, recipe):
        if not exists(path):
            absent.append(f"{model.path} is missing")
            continue
        for file, size, _ in _files(model, path):
            if not is_file(file):
                absent.append(f"{file} is missing")
            elif size_of(file) != size:
                absent.append(f"{file} has changed: it has {size_of(file):,} bytes; it had {size:,} when it was merged")
    return absent


def modified_inputs(report: Report) -> list[str]:
    """Input files whose modification time has changed since the merge; their weights may have, too."""
    # Without the recipe's folders of hub models: their files have the time of the download.
    located = ((model, path) for model, path in _locations(report, None) if exists(path))
    files = (file for model, path in located for file in _files(model, path))
    return [str(path) for path, _, modified in files if SourceFile.at(path).mtime_ns != modified]


def _locations(report: Report, recipe: Recipe | None) -> Iterator[tuple[ReportedInput, PathOrUrl]]:
    """Every input with its current path."""
    known = {} if recipe is None else dict(zip(map(str, recipe.inputs), recipe.input_paths, strict=True))
    for model in report.read:
        yield model, known.get(model.path) or path_or_url(model.path)


def _files(model: ReportedInput, path: PathOrUrl) -> Iterator[tuple[PathOrUrl, int, int]]:
    folder = folder_of(path)
    look_up(folder, model.files)
    for name, file in model.files.items():
        yield folder / name, file.size, file.modified_ns


def plan_again(recipe: Recipe, report: Report, n_process: int) -> tuple[Plan | None, list[Problem]]:
    """Plan the merge again and compare the plan with the report.

    Returns:
        The plan, None if there is none; the differences.
    """
    try:
        # The bytes do not depend on the device, the engine or the output's path.
        changes: dict[str, object] = {
            "output_path": None,
            "n_process": n_process,
            "allow_cpu_fallback": True,
            "engine": "local",
        }
        plan = make_plan(recipe.changed(**changes))
    except ModelfuseError as error:
        return None, [Problem("inputs", f"{CONFIG_NAME} cannot be merged again: {error.message}")]
    planned = {tensor.name: tensor for tensor in plan.tensors}
    problems = [
        Problem("recipe", f"{CONFIG_NAME} and its inputs give {_describe(planned.get(name))}", tensor=name)
        for name in {**planned, **report.tensors}
        if _facts(planned.get(name)) != _facts(report.tensors.get(name))
    ]
    problems += _compare_methods(plan, report)
    problems = [replace(each, message=f"{each.tensor}: {each.message}") if each.tensor else each for each in problems]
    for file in plan.files:
        said = report.sha256.get(file.name)
        if said is not None and said != file.frame.digest:
            problems.append(Problem("recipe", f"{file.name}: the merge would write another header", file=file.name))
    return plan, problems


def _compare_methods(plan: Plan, report: Report) -> Iterator[Problem]:
    """Tensors whose planned method differs from the reported one; reports of older versions have none."""
    if report.methods is None:
        return
    planned, numbers = [each.described() for each in methods_of(plan.tensors)], method_numbers(plan.tensors)
    for tensor in plan.tensors:
        entry = report.tensors.get(tensor.name)
        number = None if tensor.method is None else numbers[id(tensor.method)]
        rule = None if tensor.rule is None else tensor.rule + 1
        if entry is not None and (entry.method, entry.rule, entry.tolerance) != (number, rule, tensor.tolerance):
            yield Problem("recipe", f"{CONFIG_NAME} gives it another method than {REPORT_NAME}", tensor.name)
    if planned != report.methods:
        yield Problem("recipe", f"{CONFIG_NAME} gives other methods than {REPORT_NAME}", file=CONFIG_NAME)


def _facts(tensor: object) -> tuple[object, ...]:
    return tuple(getattr(tensor, name, None) for name in ("dtype", "shape", "file"))


def _describe(tensor: Operation | None) -> str:
    return "no such tensor" if tensor is None else f"{tensor.dtype} {list(tensor.shape)} in {tensor.file}"


def choose(plan: Plan, stored: Mapping[str, StoredTensor], full: bool, sample: int | None, seed: int) -> Plan:
    """A plan of the tensors to merge again. Those that are missing or have another type or shape are left out.

    Args:
        plan: The whole plan.
        stored: The tensors of the output.
        full: Whether to merge all tensors.
        sample: The number of tensors otherwise; None: as many as SAMPLE_BYTES allow.
        seed: Determines the random sample.
    """
    fit = [
        tensor
        for tensor in plan.tensors
        if tensor.name in stored
        and (stored[tensor.name].dtype, stored[tensor.name].shape) == (tensor.dtype, tensor.shape)
    ]
    if full:
        return replace(plan, tensors=tuple(fit), files=())
    shuffled = random.Random(seed).sample(fit, len(fit))
    chosen, left = set[str](), SAMPLE_BYTES
    for tensor in shuffled if sample is None else shuffled[:sample]:
        if sample is not None or len(chosen) < SAMPLE_LEAST or bytes_of(tensor) <= left:
            chosen.add(tensor.name)
            left -= bytes_of(tensor)
    return replace(plan, tensors=tuple(each for each in fit if each.name in chosen), tied=(), equal_pairs=(), files=())


def bytes_of(tensor: Operation) -> int:
    """The bytes of a tensor and of its sources."""
    return tensor.nbytes + tensor.bytes_read


def compare(plan: Plan, stored: Mapping[str, StoredTensor], progress: Callable[[int], None]) -> list[Problem]:
    """Merge the tensors of a plan again and compare each slice with the stored bytes."""
    if not plan.tensors:
        return []
    from modelfuse.execution.run import Run

    comparison = Comparison(plan.tensors, stored)
    try:
        Run(plan, progress).to_folder(comparison)
    except ModelfuseError as error:
        return [*comparison.problems(), Problem("inputs", f"Merging again failed: {error.message}")]
    return comparison.problems()


@dataclass(frozen=True, slots=True)
class Deviation:
    """The first element of a tensor that differs: its index, its stored bytes, and those that the merge gives."""

    element: int
    stored: bytes
    merged: bytes


class Comparison:
    """A sink of a run that compares the bytes with the stored output, and keeps the first deviation of each tensor.

    Args:
        tensors: The operations of the run.
        stored: The tensors of the output.
    """

    def __init__(self, tensors: Sequence[Operation], stored: Mapping[str, StoredTensor]) -> None:
        self._tensors, self._stored = tensors, stored
        self._files: dict[str, tuple[list[int], list[Operation]]] = {}
        for tensor in tensors:
            if tensor.size:  # Empty tensors share their offset with the next one and are never written.
                offsets, own = self._files.setdefault(tensor.file, ([], []))
                offsets.append(tensor.offset)
                own.append(tensor)
        self._first: dict[str, Deviation] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def create(self, name: str, frame: Frame) -> None:
        """Do nothing: frames were compared with the plan's."""

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Compare bytes of a file with the stored ones."""
        offsets, tensors = self._files[name]
        tensor = tensors[bisect_right(offsets, offset) - 1]
        stored = self._stored[tensor.name]
        merged, found = np.frombuffer(data, np.uint8), self._buffer(len(data))
        with stored.file.open() as file:
            file.read(stored.offset + offset - tensor.offset, found.data)
        if np.array_equal(merged, found):
            return
        itemsize = tensor.dtype.bytes
        if tensor.tolerance is None:
            index = int(np.argmax(merged != found)) // itemsize
        else:
            differ = apart(merged, found, tensor.dtype, tensor.tolerance)
            if not differ.any():
                return
            index = int(np.argmax(differ))
        own = slice(index * itemsize, (index + 1) * itemsize)
        element = (offset - tensor.offset) // itemsize + index
        with self._lock:
            known = self._first.get(tensor.name)
            if known is None or element < known.element:
                self._first[tensor.name] = Deviation(element, found[own].tobytes(), merged[own].tobytes())

    def keep(self, name: str, nbytes: int, entry: object) -> None:
        """Do nothing: an interrupted comparison is not resumed."""

    def share(self) -> None:
        """Do nothing: there are no files."""

    def ahead(self) -> None:
        """Do nothing: bytes are compared in any order."""

    def problems(self) -> list[Problem]:
        """The deviations, in the order of the tensors."""
        return [
            Problem("bytes", _describe_deviation(tensor, self._first[tensor.name]), tensor.name, tensor.file)
            for tensor in self._tensors
            if tensor.name in self._first
        ]

    def _buffer(self, nbytes: int) -> Bytes:
        buffer: Bytes | None = getattr(self._local, "buffer", None)
        if buffer is None or buffer.size < nbytes:
            buffer = self._local.buffer = np.empty(nbytes, np.uint8)
        return buffer[:nbytes]


def _describe_deviation(tensor: Operation, deviation: Deviation) -> str:
    stored, merged = (f"0x{each[::-1].hex()}" for each in (deviation.stored, deviation.merged))
    return (
        f"{tensor.name} in {tensor.file} is not what the recipe gives, from element {deviation.element:,} on: "
        f"{stored} is stored, {merged} would be right"
    )
