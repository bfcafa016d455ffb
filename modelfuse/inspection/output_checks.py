"""Check the folder of an output against its report: files, headers, index, configuration."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from modelfuse.checkpoints import CONFIG_FILE, StoredTensor, read_config, read_json
from modelfuse.checkpoints.config_checks import contradictions
from modelfuse.checkpoints.formats.paddle_reader import read_paddle
from modelfuse.checkpoints.formats.safetensors import read_safetensors
from modelfuse.checkpoints.tensor_names import group_names
from modelfuse.checkpoints.weight_files import index_of, is_index
from modelfuse.errors import CheckpointError
from modelfuse.inspection.report_reader import Problem, Report, ReportedTensor
from modelfuse.storage import PathOrUrl, children, is_file, size_of
from modelfuse.storage.files import SourceFile, read_bytes

#: Suffixes of files that loaders read as weights.
WEIGHTS = (".safetensors", ".pdparams", ".bin")
#: Bytes that are read and hashed at a time.
PIECE = 1 << 20


@dataclass
class OutputContents:
    """The headers of an output's weight files, checked against the report when an instance is created.

    Attributes:
        folder: The output.
        report: The expected content.
        files: For each weight file that can be read, its tensors by name.
        problems: What differs from the report.
    """

    folder: PathOrUrl
    report: Report
    files: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, size in self.report.files.items():
            self.problems += self._open(name, size)
        known = {*self.report.files}
        for name in sorted(path.name for path in children(self.folder) if path.name.endswith(WEIGHTS)):
            if name not in known:
                self.problems.append(Problem("file", f"{name} is not one of the merge's files", file=name))
        self.problems += self._check_tensors()
        self.problems += self._check_small_files()
        self.problems += self._check_index()
        self.problems += self._check_config()

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """The reported tensors that are in the output; of duplicates, the one in the reported file."""
        found: dict[str, StoredTensor] = {}
        for file, tensors in self.files.items():
            for name, stored in tensors.items():
                entry = self.report.tensors.get(name)
                if entry is not None and (name not in found or entry.file == file):
                    found[name] = stored
        return found

    def _open(self, name: str, size: int) -> Iterator[Problem]:
        path = self.folder / name
        if not is_file(path):
            yield Problem("file", f"{name} is missing{self._with_tensors(name)}", file=name)
            return
        actual = size_of(path)
        if actual != size:
            yield Problem("file", f"{name} has {actual:,} bytes; it had {size:,} when it was written", file=name)
        try:
            tensors, _ = _reader(name)(path)
            digest = _frame_digest(path, tensors.values())
        except CheckpointError as error:
            yield Problem("file", f"{error.message}{self._with_tensors(name)}", file=name)
            return
        self.files[name] = tensors
        if digest != self.report.sha256.get(name):
            yield Problem("file", f"{name}: its header has changed since it was written", file=name)

    def _with_tensors(self, file: str) -> str:
        names = [name for name, tensor in self.report.tensors.items() if tensor.file == file]
        return f"; it should hold {', '.join(group_names(names))}" if names else ""

    def _check_tensors(self) -> Iterator[Problem]:
        holders: dict[str, list[str]] = {}
        for file, tensors in self.files.items():
            for name in tensors:
                holders.setdefault(name, []).append(file)
        for name, entry in self.report.tensors.items():
            files = holders.get(name, [])
            if entry.file not in self.report.files:
                yield Problem("report", f"{name} is reported in {entry.file}, which is not listed", name, entry.file)
            elif not files and entry.file in self.files:
                yield Problem("tensor", f"{name} is missing from {entry.file}", name, entry.file)
            for file in files:
                yield from _check_tensor(name, file, self.files[file][name], entry)
        for name, files in holders.items():
            if name not in self.report.tensors:
                for file in files:
                    yield Problem("tensor", f"{name} in {file} is no tensor of the merge", name, file)

    def _check_small_files(self) -> Iterator[Problem]:
        names = dict.fromkeys([*self.report.copied_files, *self.report.sha256])
        for name in names:
            if name in self.report.files:
                continue
            try:
                digest = _digest(SourceFile.at(self.folder / name))
            except (OSError, CheckpointError) as error:
                reason = error.message if isinstance(error, CheckpointError) else f"{name}: {error.strerror}"
                yield Problem("file", reason.replace(f"{self.folder}/", "", 1), file=name)
                continue
            if digest != self.report.sha256.get(name):
                yield Problem("file", f"{name} is not as it was written (its sha256 differs)", file=name)

    def _check_index(self) -> Iterator[Problem]:
        whole = {re.sub(r"(-\d+-of-\d+)?(\.\w+)$", r"\2", name) for name in self.report.files}
        wanted = {index_of(name) for name in whole} if len(self.report.files) > 1 else set[str]()
        for name in sorted({path.name for path in children(self.folder) if is_index(path.name)} - wanted):
            yield Problem("index", f"{name} is not one of the merge's files; loaders would follow it", file=name)
        for name in sorted(wanted):
            if not is_file(self.folder / name):
                yield Problem("index", f"{name} is missing", file=name)
                continue
            try:
                content = read_json(self.folder / name)
            except CheckpointError as error:
                yield Problem("index", error.message, file=name)
            else:
                yield from _check_index(name, content, self.report)

    def _check_config(self) -> Iterator[Problem]:
        try:
            config = read_config(self.folder)
        except CheckpointError as error:
            yield Problem("config", error.message, file=CONFIG_FILE)
            return
        shapes = {name: stored.shape for name, stored in self.tensors.items()}
        if shapes.keys() >= self.report.tensors.keys():  # Missing tensors were reported already.
            for tensor, message in contradictions(config, shapes):
                yield Problem("config", message, tensor, CONFIG_FILE)


def _reader(name: str) -> Callable[[PathOrUrl], tuple[dict[str, StoredTensor], dict[str, str]]]:
    """The function that reads the header of a weight file."""
    if name.endswith(".bin"):
        from modelfuse.checkpoints.formats.torch_reader import read_torch

        return read_torch
    return read_paddle if name.endswith(".pdparams") else read_safetensors


def _digest(file: SourceFile) -> str:
    """The sha256 of a whole file."""
    digest = hashlib.sha256()
    with file.open() as opened:
        for start in range(0, file.size, PIECE):
            piece = bytearray(min(PIECE, file.size - start))
            opened.read(start, memoryview(piece))
            digest.update(piece)
    return digest.hexdigest()


def _frame_digest(path: PathOrUrl, tensors: Iterable[StoredTensor]) -> str:
    """The sha256 of a weight file's frame: all bytes outside of tensors, in order.

    Raises:
        CheckpointError: If a tensor is not stored as one run of bytes, as merges write them.
    """
    file, digest, position = SourceFile.at(path), hashlib.sha256(), 0
    spans = sorted((tensor.offset, tensor.nbytes) for tensor in tensors if tensor.nbytes)
    for tensor in tensors:
        if type(tensor) is not StoredTensor:
            raise CheckpointError(f"{path}: tensor {tensor.name!r} is not stored as a merge writes it")
    for begin, nbytes in (*spans, (file.size, 0)):
        for start in range(position, begin, PIECE):
            digest.update(read_bytes(file, start, min(PIECE, begin - start)))
        position = max(position, begin + nbytes)
    return digest.hexdigest()


def _check_tensor(name: str, file: str, stored: StoredTensor, entry: ReportedTensor) -> Iterator[Problem]:
    if file != entry.file:
        yield Problem("tensor", f"{name} is in {file}, not in {entry.file} as reported", name, file)
    if stored.dtype != entry.dtype:
        yield Problem("tensor", f"{name} in {file} is {stored.dtype}, reported is {entry.dtype}", name, file)
    if stored.shape != entry.shape:
        shapes = f"{list(stored.shape)}, reported is {list(entry.shape)}"
        yield Problem("tensor", f"{name} in {file} has the shape {shapes}", name, file)


def _check_index(file: str, content: Mapping[str, object], report: Report) -> Iterator[Problem]:
    weight_map, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(weight_map, dict):
        yield Problem("index", f"{file} has no weight_map", file=file)
        return
    for name in dict.fromkeys([*report.tensors, *weight_map]):
        there, entry = weight_map.get(name), report.tensors.get(name)
        if entry is None:
            yield Problem("index", f"{file} names {name}, which is no tensor of the merge", name, file)
        elif there is None:
            yield Problem("index", f"{file} does not name {name}", name, file)
        elif there != entry.file:
            yield Problem("index", f"{file} puts {name} into {there}, reported is {entry.file}", name, file)
    whole = sum(entry.nbytes for entry in report.tensors.values())
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    if said != whole:
        yield Problem("index", f"{file}: total_size is {said}, the tensors have {whole} bytes", file=file)
