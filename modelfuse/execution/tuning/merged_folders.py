"""Merged models that are evaluated and written over: on a RAM disk where they fit, else beside the study."""

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
#: What the machine, or the container, may use of memory, and uses of it.
CONTAINER_LIMIT, CONTAINER_USE = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
#: The share of a RAM disk and of the memory that is free which merged models may take: evaluations take some, too.
MOST_RAM = 0.5
#: Open files beside the weight files.
SPARE_FILES = 512


class MergedFolder:
    """A merged model that the next merge writes over, where it is another one.

    Args:
        parent: Where it is.
    """

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self.path = parent / "merged"
        self.digests: dict[str, str] = {}
        self._descriptors: dict[str, int] = {}
        self._frames: dict[str, str] = {}
        self._made: dict[str, Operation] = {}
        #: What runs have kept of each tensor.
        self._entries: dict[str, list[object]] = {}

    def prepare(self, plan: Plan, name: str) -> Path:
        """Get ready for a merge: what it makes as it is here already stays, under a path of its own.

        A path that is used once only cannot be mistaken for an earlier model by what caches results by paths.

        Args:
            plan: The merge.
            name: What the folder is to be called.

        Returns:
            The folder.
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
        """What was kept of tensors that are as they are to be."""
        return iter([entry for own in self._entries.values() for entry in own])

    def create(self, name: str, frame: Frame) -> None:
        """Create a weight file of its final size, if it is not there."""
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
        """Write at an offset of a weight file; safe from any thread."""
        try:
            write_all(self._descriptors[name], data, offset)
        except OSError as error:
            raise cannot_write(error, self.path / name) from error

    def keep(self, name: str, nbytes: int, entry: object) -> None:
        """Note what is finished, for the next merge."""
        if isinstance(entry, dict):
            self._entries.setdefault(entry["tensor"], []).append(entry)

    def share(self) -> None:
        """Nothing: no other machine sees the folder."""

    def ahead(self) -> None:
        """Nothing: files take bytes in any order."""

    def write_file(self, name: str, content: bytes | Iterable[bytes]) -> None:
        """Write a small file, in the place of an earlier one."""
        path, whole = self.path / name, content if isinstance(content, bytes) else b"".join(content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_bytes(whole)
        except OSError as error:
            raise cannot_write(error, path) from error
        self.digests[name] = hashlib.sha256(whole).hexdigest()

    def commit(self) -> None:
        """Nothing: nobody looks before, and it need not outlive the machine."""

    def unchanged(self) -> dict[str, list[bool]]:
        """For each merged tensor with a base, which of the models hold the base's values."""
        found = dict[str, list[bool]]()
        for tensor, entries in self._entries.items():
            distances = [each["distances"] for each in entries if isinstance(each, dict)]
            if distances and all(distances):
                differs = zip(*(each[0] for each in distances), strict=True)
                found[tensor] = [not any(own) for own in differs]
        return found

    def clear(self) -> None:
        """Remove everything."""
        while self._descriptors:
            with contextlib.suppress(OSError):
                os.close(self._descriptors.popitem()[1])
        self._entries, self._made, self._frames, self.digests = {}, {}, {}, {}
        remove(self.path)


def _most_ram() -> int:
    """Bytes that merged models may take of the RAM disk, which are memory; zero where there is none."""
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
    """What folders of merges begin with, so that those are known that a killed run of the same study has left."""
    return f"modelfuse-tune-{hashlib.sha256(os.fsencode(study)).hexdigest()[:16]}-"


def _parent_of(study: Path, scratch: Path | None, needed: int) -> Path:
    """A new folder for merged models, that only the user may look into.

    Raises:
        OutputError: If there is no room anywhere.
    """
    prefix = prefix_of(study)
    places = [scratch] if scratch is not None else [RAM_DISK, study]
    for place in dict.fromkeys((*places, RAM_DISK)):
        # The study's lock is held: nobody uses what a killed run has left.
        for left in place.glob(f"{prefix}*") if place.is_dir() else ():
            if is_own_folder(left):
                remove(left)
    free = [_most_ram() if each == RAM_DISK and scratch is None else shutil.disk_usage(each).free for each in places]
    for place, most in zip(places, free, strict=True):
        if needed <= most:
            return Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    raise OutputError(
        f"Merged models to evaluate need {size(needed)}, but only {size(free[-1])} are free in {places[-1]}",
        "Free some space, name another folder with --scratch, or evaluate fewer at once with --jobs.",
    )


@contextlib.contextmanager
def merged_folders(study: Path, scratch: Path | None, needed: int, count: int) -> Iterator[Sequence[MergedFolder]]:
    """Folders for merged models, removed at the end.

    Args:
        study: The folder of the study.
        scratch: Where they are to be; None: on a RAM disk if they fit, else in the folder of the study.
        needed: Bytes of each.
        count: How many.

    Raises:
        OutputError: If they find no room.
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
