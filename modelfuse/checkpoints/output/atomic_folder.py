"""An output folder that appears atomically.

Files are created at their final size in a hidden folder beside the output; workers write at planned offsets. Then
everything is synced, and one rename makes it visible. A lock file beside it prevents two merges into one output; it is
released when its process ends. A journal beside it records finished spans: a merge that is killed, interrupted or
finds the disk full leaves both, and the same request resumes from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from modelfuse.checkpoints.made_files import check_replaceable
from modelfuse.checkpoints.output.background_sync import BackgroundSync
from modelfuse.checkpoints.output.failures import cannot_write, is_worth_going_on
from modelfuse.checkpoints.tensors import Frame
from modelfuse.errors import OutputError
from modelfuse.storage.files import allow_open_files
from modelfuse.storage.local.folder_swap import exchange, remove, restore
from modelfuse.storage.local.journal import Journal, sync_folder, write_all
from modelfuse.storage.local.lock import Lock, is_same_file
from modelfuse.storage.local.own_files import is_own_folder, open_new, open_own
from modelfuse.storage.local.page_cache import settle
from modelfuse.storage.local.preallocate import allocate

#: Open files besides the weight files: a few per worker.
SPARE_FILES = 512


class OutputFolder:
    """An output folder that is being written; a context manager.

    On an error of the request or an input, it removes everything; on an interruption or a system failure, it leaves
    what the next run can resume.

    Args:
        path: The path of the output.
        overwrite: Whether it may replace an existing output.
        facts: Everything that its bytes depend on, by name, as JSON values. Work for other facts is not resumed.
    """

    def __init__(self, path: Path, overwrite: bool = False, facts: Mapping[str, object] | None = None) -> None:
        # The target of a link, so that the link itself is kept.
        self.path = path = Path(os.path.realpath(path))
        self._overwrite = overwrite
        self._facts = dict(facts or {})
        self._temporary = temporary_sibling(path)
        self._aside = path.with_name(f".{path.name}.modelfuse.old")
        self._lock = Lock(path.with_name(f".{path.name}.modelfuse.lock"), path)
        self._descriptors: dict[str, int] = {}
        self._journal = Journal(path.with_name(f".{path.name}.modelfuse.journal"))
        self._sync = BackgroundSync(self._keep)
        #: Weight files that an earlier run has left, by name.
        self._left: frozenset[str] = frozenset()
        self._entries: Iterator[object] = iter(())
        #: Why an earlier run cannot be resumed; None if there was none, or it can.
        self.restart_reason: str | None = None
        #: sha256 by file name: of every small file, and of each weight file without its tensors' bytes.
        self.digests: dict[str, str] = {}
        self._new_parents: list[Path] = []

    def __enter__(self) -> Self:
        try:
            self._new_parents = list(itertools.takewhile(lambda parent: not parent.exists(), self.path.parents))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            if restore(self._aside, self.path) and not self._overwrite:
                raise OutputError(
                    f"output_path {self.path} exists: a merge that was to replace it was killed, and it is put back",
                    "Use --overwrite to replace it whole when all is done.",
                )
            if not self._takes_up():
                self._clear()
                self._temporary.mkdir()
        except BaseException as error:
            self._lock.release()
            self._remove_new_parents()
            if isinstance(error, OSError):
                raise cannot_write(error, Path(error.filename or self._temporary)) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        keeps = done = False
        try:
            self._sync.stop()
            done = self._appeared()
            keeps = error is not None and not done and is_worth_going_on(error) and self._kept()
            self._close()
            if not keeps:
                with contextlib.suppress(OSError):  # Leftovers do no harm: the next run removes them.
                    self._clear()
        finally:
            self._close()
            self._lock.release()
        if error is not None and keeps:
            error.add_note(
                f"What is done is kept in {self._temporary}: the same command resumes from there. "
                "Remove the folder if you do not want that."
            )
        elif error is not None and done:
            error.add_note(f"The output was ready before: {self.path} is whole.")
        elif error is not None:
            self._remove_new_parents()

    def finished(self) -> Iterator[object]:
        """The entries that earlier runs passed to :meth:`keep`; must be read before anything is written."""
        yield from self._entries

    def create(self, name: str, frame: Frame) -> None:
        """Create a weight file of its final size with its frame, or open the one that an earlier run has left."""
        path = self._temporary / name
        # Descriptors are assigned from the lowest on, so the last one shows how many files the process has open.
        allow_open_files(max(self._descriptors.values(), default=0) + SPARE_FILES)
        made = name not in self._left
        try:
            self._descriptors[name] = descriptor = (open_new if made else open_own)(path, os.O_RDWR)
            if made:
                allocate(descriptor, frame.size)
        except OSError as error:
            raise cannot_write(error, path) from error
        for offset, piece in frame.pieces if made else ():
            self.write(name, offset, memoryview(piece))
        self.digests[name] = frame.digest

    def keep(self, name: str, nbytes: int, entry: object) -> None:
        """Record a finished span of a weight file; it is synced and journaled in the background.

        Args:
            name: The file.
            nbytes: The bytes of the span.
            entry: The journal entry, as a JSON value.

        Raises:
            OutputError: If an earlier span could not be synced.
        """
        try:
            self._sync.add(name, nbytes, entry)
        except OSError as error:
            raise cannot_write(error, self.path / name) from error

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write at an offset of a weight file; thread-safe.

        Raises:
            OutputError: If the disk is full or fails.
        """
        try:
            write_all(self._descriptors[name], data, offset)
        except OSError as error:
            raise cannot_write(error, self.path / name) from error

    def ahead(self) -> None:
        """None: files take writes in any order."""

    def share(self) -> Path:
        """The folder, for other machines to write the files directly.

        The files are synced first: a page that this machine wrote back later would undo writes of other machines.
        """
        try:
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)
            sync_folder(self._temporary)
        except OSError as error:
            raise cannot_write(error, self.path) from error
        return self._temporary

    def write_file(self, name: str, content: bytes | Iterable[bytes]) -> None:
        """Write and sync a small file, given whole or in parts."""
        digest, path = hashlib.sha256(), self._temporary / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(open_new(path, os.O_WRONLY), "wb") as file:
                for part in (content,) if isinstance(content, bytes) else content:
                    file.write(part)
                    digest.update(part)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(error, path) from error
        self.digests[name] = digest.hexdigest()

    def commit(self) -> None:
        """Sync everything, and make the output visible atomically.

        Raises:
            OutputError: If syncing or renaming fails; the output is then as it was.
        """
        try:
            self._sync.stop()
            self._sync.check()
            if self._journal.exists:
                self._sync.flush()
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)
            for folder, _, _ in os.walk(self._temporary):
                sync_folder(Path(folder))
            self._appear()
            sync_folder(self.path.parent)
        except OSError as error:
            raise cannot_write(error, self.path) from error

    def _keep(self, names: set[str], entries: list[object]) -> None:
        """Sync the data, then write the journal entries; the first time, sync all created files too."""
        is_first = not self._journal.exists
        for name in self._descriptors if is_first else names:
            settle(self._descriptors[name])
        if is_first:
            sync_folder(self._temporary)
            sync_folder(self.path.parent)
            files = {name: _identity(os.fstat(descriptor)) for name, descriptor in self._descriptors.items()}
            entries = [self._facts, files, *entries]
        self._journal.append(entries)

    def _kept(self) -> bool:
        """Journal the remaining finished spans, if possible; returns whether the next run can resume anything."""
        with contextlib.suppress(OSError):
            self._sync.flush()
        return self._journal.exists

    def _takes_up(self) -> bool:
        """Whether an earlier run of the same request can be resumed."""
        self._entries = self._journal.read()
        facts, files = next(self._entries, None), next(self._entries, None)
        if not isinstance(facts, dict) or not isinstance(files, dict):
            if self._journal.path.exists():
                self.restart_reason = f"{self._journal.path} is damaged"
            return False
        changed = [name for name in {**facts, **self._facts} if facts.get(name) != self._facts.get(name)]
        if changed:
            self.restart_reason = f"{changed[0]} has changed since the last run" + " (and more)" * (len(changed) > 1)
            return False
        try:
            there = {each.name: _identity(each.stat(follow_symlinks=False)) for each in os.scandir(self._temporary)}
        except OSError:
            there = {}
        if not is_own_folder(self._temporary) or any(there.get(name) != known for name, known in files.items()):
            # Also after a killed replacement: the folder then has the old output.
            self.restart_reason = f"{self._temporary} is not as the last run has left it"
            return False
        self._left = frozenset(files)
        for name in there.keys() - files.keys():
            remove(self._temporary / name)
        return True

    def _clear(self) -> None:
        self._journal.remove()
        remove(self._temporary)

    def _appeared(self) -> bool:
        """Whether the folder at the output's path is the one that was written here."""
        some = next(iter(self._descriptors.items()), None)
        if some is None:
            return False
        try:
            return is_same_file(some[1], self.path / some[0])
        except OSError:
            return False

    def _close(self) -> None:
        while self._descriptors:
            with contextlib.suppress(OSError):  # Everything relevant was synced.
                os.close(self._descriptors.popitem()[1])
        with contextlib.suppress(OSError):
            self._journal.close()

    def _appear(self) -> None:
        if not self.path.exists():
            os.rename(self._temporary, self.path)
        elif self._overwrite:
            check_replaceable(self.path)  # Checked again: a merge may take hours, and files may have been added.
            exchange(self._temporary, self.path, self._aside)
        else:
            # Replaces an empty folder; fails if files were added meanwhile.
            os.rename(self._temporary, self.path)

    def _remove_new_parents(self) -> None:
        """Remove parent folders that were created, if they are empty."""
        with contextlib.suppress(OSError):
            for parent in self._new_parents:
                parent.rmdir()


def _identity(status: os.stat_result) -> list[int]:
    return [status.st_ino, status.st_size]


def temporary_sibling(path: Path) -> Path:
    """The hidden folder that an output at a resolved path is written to."""
    return path.with_name(f".{path.name}.modelfuse")


def bytes_left(path: Path) -> int:
    """The disk space of what an earlier run has left beside an output, which is reused or removed."""
    with contextlib.suppress(OSError), os.scandir(temporary_sibling(Path(os.path.realpath(path)))) as entries:
        return sum(entry.stat().st_blocks * 512 for entry in entries)
    return 0
