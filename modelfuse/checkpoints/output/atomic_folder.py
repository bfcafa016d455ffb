"""An output folder that appears whole or not at all.

Files are made in a hidden sibling of the output at their final size; workers write at planned offsets.
Then everything is synced, and one rename shows it. A lock beside it keeps two merges apart, and ends with
the process that holds it. A journal beside it says what is finished: what is killed, interrupted or finds the
disk full leaves both, and the same request resumes from there.
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
from modelfuse.checkpoints.output.background_sync import Keeper
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

#: Open files beside the weight files: a few for every worker.
SPARE_FILES = 512


class OutputFolder:
    """The output while it is being made; a context manager.

    Left by an error that says the request or an input is wrong, it leaves nothing behind; by an interruption or
    a failure of the system, what the next run resumes.

    Args:
        path: Where the output is to appear.
        overwrite: Whether it may replace what is there.
        facts: What decides its bytes: name → value, ready for JSON. Work that was done for other facts is not
            taken up.
    """

    def __init__(self, path: Path, overwrite: bool = False, facts: Mapping[str, object] | None = None) -> None:
        # Where a link leads, so that the link stays one.
        self.path = path = Path(os.path.realpath(path))
        self._overwrite = overwrite
        self._facts = dict(facts or {})
        self._temporary = temporary_sibling(path)
        self._aside = path.with_name(f".{path.name}.modelfuse.old")
        self._lock = Lock(path.with_name(f".{path.name}.modelfuse.lock"), path)
        self._descriptors: dict[str, int] = {}
        self._journal = Journal(path.with_name(f".{path.name}.modelfuse.journal"))
        self._keeper = Keeper(self._keep)
        #: Weight files that an earlier run has left, by name.
        self._left: frozenset[str] = frozenset()
        self._entries: Iterator[object] = iter(())
        #: Why nothing that an earlier run has left can be used; None if there was nothing, or it can.
        self.afresh: str | None = None
        #: The sha256 of every small file, and of all but the tensors of every weight file, by name.
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
            self._keeper.stop()
            done = self._appeared()
            keeps = error is not None and not done and is_worth_going_on(error) and self._kept()
            self._close()
            if not keeps:
                with contextlib.suppress(OSError):  # What stays does no harm: the next run removes it.
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
        """The entries that earlier runs have handed to :meth:`keep`; to be taken before anything is written."""
        yield from self._entries

    def create(self, name: str, frame: Frame) -> None:
        """Create a weight file of its final size and write all that is no tensor's, or open what a run has left."""
        path = self._temporary / name
        # Numbers are given out from the lowest on: the last one tells what else the process has open.
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
        """Note that so many bytes of a weight file are finished; soon, they survive the end of this process.

        Args:
            name: The file.
            nbytes: How many were written since the last call.
            entry: What :meth:`finished` is to give to the next run, ready for JSON.

        Raises:
            OutputError: If an earlier part could not be synced.
        """
        try:
            self._keeper.add(name, nbytes, entry)
        except OSError as error:
            raise cannot_write(error, self.path / name) from error

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write at an offset of a weight file; safe from any thread.

        Raises:
            OutputError: If the disk is full or fails.
        """
        try:
            write_all(self._descriptors[name], data, offset)
        except OSError as error:
            raise cannot_write(error, self.path / name) from error

    def ahead(self) -> None:
        """Nothing: files take bytes in any order."""

    def share(self) -> Path:
        """The folder of the files, which other machines may now write to.

        What was created is synced: a page of it that this machine wrote later would undo what others write there.
        """
        try:
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)
            sync_folder(self._temporary)
        except OSError as error:
            raise cannot_write(error, self.path) from error
        return self._temporary

    def write_file(self, name: str, content: bytes | Iterable[bytes]) -> None:
        """Write and sync a small file, whole or by its parts."""
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
        """Sync everything and make it appear, in one step.

        Raises:
            OutputError: If syncing or renaming fails; the output is then as it was.
        """
        try:
            self._keeper.stop()
            self._keeper.check()
            if self._journal.exists:
                self._keeper.flush()
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)
            for folder, _, _ in os.walk(self._temporary):
                sync_folder(Path(folder))
            self._appear()
            sync_folder(self.path.parent)
        except OSError as error:
            raise cannot_write(error, self.path) from error

    def _keep(self, names: set[str], entries: list[object]) -> None:
        """First the data, then the word that it is there. What the first word rests on is all that was created."""
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
        """Keep what is not kept yet, as far as that can be done; whether the next run finds anything."""
        with contextlib.suppress(OSError):
            self._keeper.flush()
        return self._journal.exists

    def _takes_up(self) -> bool:
        """Whether an earlier run of the same request has left something to go on from."""
        self._entries = self._journal.read()
        facts, files = next(self._entries, None), next(self._entries, None)
        if not isinstance(facts, dict) or not isinstance(files, dict):
            if self._journal.path.exists():
                self.afresh = f"{self._journal.path} is damaged"
            return False
        changed = [name for name in {**facts, **self._facts} if facts.get(name) != self._facts.get(name)]
        if changed:
            self.afresh = f"{changed[0]} has changed since the last run" + " (and more)" * (len(changed) > 1)
            return False
        try:
            there = {each.name: _identity(each.stat(follow_symlinks=False)) for each in os.scandir(self._temporary)}
        except OSError:
            there = {}
        if not is_own_folder(self._temporary) or any(there.get(name) != known for name, known in files.items()):
            # Also after a replacement that was killed: what is there now is the old output.
            self.afresh = f"{self._temporary} is not as the last run has left it"
            return False
        self._left = frozenset(files)
        for name in there.keys() - files.keys():
            remove(self._temporary / name)
        return True

    def _clear(self) -> None:
        self._journal.remove()
        remove(self._temporary)

    def _appeared(self) -> bool:
        """Whether the folder at the output's place is the one made here."""
        some = next(iter(self._descriptors.items()), None)
        if some is None:
            return False
        try:
            return is_same_file(some[1], self.path / some[0])
        except OSError:
            return False

    def _close(self) -> None:
        while self._descriptors:
            with contextlib.suppress(OSError):  # All that matters was synced.
                os.close(self._descriptors.popitem()[1])
        with contextlib.suppress(OSError):
            self._journal.close()

    def _appear(self) -> None:
        if not self.path.exists():
            os.rename(self._temporary, self.path)
        elif self._overwrite:
            check_replaceable(self.path)  # Again: a merge may take hours, and something may have come into it.
            exchange(self._temporary, self.path, self._aside)
        else:
            # Replaces an empty folder; fails if anything has come into it meanwhile.
            os.rename(self._temporary, self.path)

    def _remove_new_parents(self) -> None:
        """Leave no empty folder behind; what others have put there meanwhile stays."""
        with contextlib.suppress(OSError):
            for parent in self._new_parents:
                parent.rmdir()


def _identity(status: os.stat_result) -> list[int]:
    return [status.st_ino, status.st_size]


def temporary_sibling(path: Path) -> Path:
    """Where the output that is to appear at a resolved path is made."""
    return path.with_name(f".{path.name}.modelfuse")


def bytes_left(path: Path) -> int:
    """The bytes on the disk of what an earlier run has left beside an output: used again, or removed."""
    with contextlib.suppress(OSError), os.scandir(temporary_sibling(Path(os.path.realpath(path)))) as entries:
        return sum(entry.stat().st_blocks * 512 for entry in entries)
    return 0
