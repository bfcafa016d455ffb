"""An output folder that appears whole or not at all.

Files are made in a hidden sibling of the output at their final size; workers write at planned offsets.
Then everything is synced, and one rename shows it. A lock beside it keeps two merges apart, and ends with
the process that holds it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import itertools
import os
import resource
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from modelfuse.checkpoints.tensors import Frame
from modelfuse.errors import OutputError

#: Open files beside the weight files: a few for every worker.
SPARE_FILES = 512
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class OutputFolder:
    """The output while it is being made; a context manager that leaves nothing behind if it fails.

    Args:
        path: Where the output is to appear.
        overwrite: Whether it may replace what is there.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        # Where a link leads, so that the link stays one.
        self.path = path = path.resolve()
        self._overwrite = overwrite
        self._temporary = path.with_name(f".{path.name}.modelfuse")
        self._lock = path.with_name(f".{path.name}.modelfuse.lock")
        self._lock_descriptor = -1
        self._descriptors: dict[str, int] = {}
        #: The sha256 of every small file, and of all but the tensors of every weight file, by name.
        self.digests: dict[str, str] = {}
        self._new_parents: list[Path] = []

    def __enter__(self) -> Self:
        try:
            self._new_parents = list(itertools.takewhile(lambda parent: not parent.exists(), self.path.parents))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock_descriptor = self._acquire_lock()
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir()
        except OSError as error:
            self._release_lock()
            self._remove_new_parents()
            raise self._failure(error, self._temporary) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._release_lock()
        if error is not None:
            self._remove_new_parents()

    def create(self, name: str, frame: Frame) -> None:
        """Create a weight file of its final size and write all that is no tensor's."""
        path = self._temporary / name
        _allow_open_files(len(self._descriptors) + SPARE_FILES)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._descriptors[name] = descriptor
            os.truncate(descriptor, frame.size)
        except OSError as error:
            raise self._failure(error, path) from error
        for offset, piece in frame.pieces:
            self.write(name, offset, memoryview(piece))
        self.digests[name] = frame.digest

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write at an offset of a weight file, however many system calls it takes; safe from any thread.

        Raises:
            OutputError: If the disk is full or fails.
        """
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._descriptors[name], data[done:], offset + done)
            except OSError as error:
                raise self._failure(error, self.path / name) from error

    def write_file(self, name: str, content: bytes) -> None:
        """Write and sync a small file."""
        self.digests[name] = hashlib.sha256(content).hexdigest()
        path = self._temporary / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._failure(error, path) from error

    def commit(self) -> None:
        """Sync everything and make it appear, in one step.

        Raises:
            OutputError: If syncing or renaming fails; the output is then as it was.
        """
        try:
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)
            for folder, _, _ in os.walk(self._temporary):
                _sync_folder(Path(folder))
            self._appear()
            _sync_folder(self.path.parent)
        except OSError as error:
            raise self._failure(error, self.path) from error

    def _appear(self) -> None:
        if not self.path.exists():
            os.rename(self._temporary, self.path)
        elif self._overwrite:
            _exchange(self._temporary, self.path)
        else:
            # Replaces an empty folder; fails if anything has come into it meanwhile.
            os.rename(self._temporary, self.path)

    def _acquire_lock(self) -> int:
        while True:
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
                os.close(descriptor)
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                raise OutputError(
                    f"Another merge is writing to {self.path}" + (f" ({holder})" if holder else ""),
                    "Wait until it ends, or choose another output_path.",
                ) from None
            if _is_same_file(descriptor, self._lock):
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
                return descriptor
            os.close(descriptor)  # Its holder removed it while we waited for it.

    def _release_lock(self) -> None:
        if self._lock_descriptor >= 0:
            self._lock.unlink(missing_ok=True)
            os.close(self._lock_descriptor)
            self._lock_descriptor = -1

    def _remove_new_parents(self) -> None:
        """Leave no empty folder behind; what others have put there meanwhile stays."""
        with contextlib.suppress(OSError):
            for parent in self._new_parents:
                parent.rmdir()

    def _failure(self, error: OSError, path: Path) -> OutputError:
        hint = "Free some space and merge again." if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        return OutputError(f"{path} cannot be written: {error.strerror}", hint)


def _allow_open_files(count: int) -> None:
    """All weight files stay open; systems allow a thousand unless asked for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders so that ``old`` is at no moment absent; what it held is left at ``new``.

    Linux can do it in one system call; elsewhere two renames must do.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        if rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            return
        if ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    aside = new.with_name(f"{new.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(old, aside)
    os.rename(new, old)
    os.rename(aside, new)
