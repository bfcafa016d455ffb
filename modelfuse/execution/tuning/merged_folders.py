"""Folders of merged models that are evaluated and overwritten: on a RAM disk if they fit, else beside the study."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from modelfuse.checkpoints.output.failures import cannot_write
from modelfuse.checkpoints.tensors import Frame
from modelfuse.errors import OutputError
from modelfuse.planning.operations import Operation
from modelfuse.planning.plan import Plan
from modelfuse.recipe.sizes import size
from modelfuse.storage.files import allow_open_files
from modelfuse.storage.local.folder_swap import remove
from modelfuse.storage.local.journal import write_all
from modelfuse.storage.local.own_files import is_own_folder, open_new
from modelfuse.storage.local.preallocate import allocate

RAM_DISK = Path("/dev/shm")
MEMORY = Path("/proc/meminfo")
#: Memory limit and memory use of the container, in bytes.
CONTAINER_LIMIT, CONTAINER_USE = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
#: The share of the free RAM disk and memory that merged models may take; evaluations need memory, too.
MOST_RAM = 0.5
#: Open files to allow in addition to the weight files.
SPARE_FILES = 512


class MergedFolder:
    """A sink for one merge after another; tensors whose operation is unchanged are not merged again.

    Args:
        parent: The parent folder.
    """

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self.path = parent / "merged"
        self.digests: dict[str, str] = {}
        self._descriptors: dict[str, int] = {}
        self._frames: dict[str, str] = {}
        self._made: dict[str, Operation] = {}
        #: The journal entries of each tensor's finished spans.
        self._entries: dict[str, list[object]] = {}

    def prepare(self, plan: Plan, name: str) -> Path:
        """Prepare the folder for a merge: rename it, and forget all tensors that the merge changes.

        Each merge has a path of its own, as evaluations may cache results by path.

        Args:
            plan: The plan of the merge.
            name: The new name of the folder.

        Returns:
            The new path of the folder.
        """
        if {file.name: file.frame.digest for file in plan.files} != self._frames:
            self.clear()
            self._frames = {file.name: file.frame.digest for file in plan.files}
        path = self._parent / name
        if self.path.exists():
            os.rename(self.path, path)
        else:
            path.mkdir(mode=0o700)
        self.path = path
        self.digests = {each: digest for each, digest in self.digests.items() if each in self._frames}
        same = {each.name for each in plan.tensors if self._made.get(each.name) == each}
        self._entries = {tensor: own for tensor, own in self._entries.items() if tensor in same}
        self._made = {each.name: each for each in plan.tensors}
        return path

    def finished(self) -> Iterator[object]:
        """The journal entries of all tensors that need not be merged again."""
        return iter([entry for own in self._entries.values() for entry in own])

    def create(self, name: str, frame: Frame) -> None:
        """Create a weight file of its final size, unless it exists.

        Raises:
            OutputError: If it cannot be created.
        """
        if name in self._descriptors:
            return
        path = self.path / name
        allow_open_files(max(self._descriptors.values(), default=0) + SPARE_FILES)
        try:
            self._descriptors[name] = descriptor = open_new(path, os.O_RDWR)
            allocate(descriptor, frame.size)
        except OSError as error:
            raise cannot_write(error, path) from error
        for offset, piece in frame.pieces:
            self.write(name, offset, memoryview(piece))
        self.digests[name] = frame.digest

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write at an offset of a weight file; safe from any thread.

        Raises:
            OutputError: If it cannot be written.
        """
        try:
            write_all(self._descriptors[name], data, offset)
        except OSError as error:
            raise cannot_write(error, self.path / name) from error

    def keep(self, name: str, nbytes: int, entry: object) -> None:
        """Keep the journal entry of a finished span for the next merge."""
        if isinstance(entry, dict):
            self._entries.setdefault(entry["tensor"], []).append(entry)

    def share(self) -> None:
        """Do nothing: no other machine uses the folder."""

    def ahead(self) -> None:
        """Do nothing: files are written in any order."""

    def write_file(self, name: str, content: bytes | Iterable[bytes]) -> None:
        """Write or replace a small file.

        Raises:
            OutputError: If it cannot be written.
        """
        path, whole = self.path / name, content if isinstance(content, bytes) else b"".join(content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_bytes(whole)
        except OSError as error:
            raise cannot_write(error, path) from error
        self.digests[name] = hashlib.sha256(whole).hexdigest()

    def commit(self) -> None:
        """Do nothing: the folder is temporary, and is read only after the merge."""

    def unchanged(self) -> dict[str, list[bool]]:
        """For each tensor that was merged with a base, whether each model has the base's values."""
        found = dict[str, list[bool]]()
        for tensor, entries in self._entries.items():
            distances = [each["distances"] for each in entries if isinstance(each, dict)]
            if distances and all(distances):
                differs = zip(*(each[0] for each in distances), strict=True)
                found[tensor] = [not any(own) for own in differs]
        return found

    def clear(self) -> None:
        """Close all files and remove the folder."""
        while self._descriptors:
            with contextlib.suppress(OSError):
                os.close(self._descriptors.popitem()[1])
        self._entries, self._made, self._frames, self.digests = {}, {}, {}, {}
        remove(self.path)


def _most_ram() -> int:
    """The bytes that merged models may take on the RAM disk; zero if there is none."""
    if not os.access(RAM_DISK, os.W_OK | os.X_OK):
        return 0
    found = [shutil.disk_usage(RAM_DISK).free]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        line = next(line for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        found.append(int(CONTAINER_LIMIT.read_text()) - int(CONTAINER_USE.read_text()))
    return int(min(found) * MOST_RAM)


def prefix_of(study: Path) -> str:
    """The prefix of the temporary folders of a study, by which those of a killed run are found."""
    return f"modelfuse-tune-{hashlib.sha256(os.fsencode(study)).hexdigest()[:16]}-"


def _parent_of(study: Path, scratch: Path | None, needed: int) -> Path:
    """Create a temporary folder for merged models, with access for the user only; remove those of a killed run.

    Raises:
        OutputError: If no disk has enough free space.
    """
    prefix = prefix_of(study)
    parents = [scratch] if scratch is not None else [RAM_DISK, study]
    for parent in dict.fromkeys((*parents, RAM_DISK)):
        # The study's lock is held, so no process uses these folders.
        for left in parent.glob(f"{prefix}*") if parent.is_dir() else ():
            if is_own_folder(left):
                remove(left)
    free = [_most_ram() if each == RAM_DISK and scratch is None else shutil.disk_usage(each).free for each in parents]
    for parent, most in zip(parents, free, strict=True):
        if needed <= most:
            return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    raise OutputError(
        f"Merged models to evaluate need {size(needed)}, but only {size(free[-1])} are free in {parents[-1]}",
        "Free some space, name another folder with --scratch, or evaluate fewer at a time with --jobs.",
    )


@contextlib.contextmanager
def merged_folders(study: Path, scratch: Path | None, needed: int, count: int) -> Iterator[Sequence[MergedFolder]]:
    """Folders for merged models, which are removed at the end.

    Args:
        study: The folder of the study.
        scratch: Their parent folder; None: the RAM disk if they fit, else the folder of the study.
        needed: The bytes of each.
        count: The number of folders.

    Raises:
        OutputError: If there is not enough space, or the parent cannot be written.
    """
    try:
        parent = _parent_of(study, scratch, needed * count)
    except OSError as error:
        raise cannot_write(error, scratch or study) from error
    folders = [MergedFolder(parent / str(number)) for number in range(count)]
    try:
        for number in range(count):
            (parent / str(number)).mkdir()
        yield folders
    finally:
        for folder in folders:
            folder.clear()
        remove(parent)
