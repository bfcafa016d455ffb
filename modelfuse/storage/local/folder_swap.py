"""Replace one folder by another atomically."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from modelfuse.storage.local.own_files import is_own_folder
from modelfuse.storage.local.system_calls import failure_of, find

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def exchange(new: Path, old: Path, aside: Path) -> None:
    """Swap two folders so that ``old`` always exists; its former content is then at ``new``.

    Linux has a system call for it; elsewhere it takes two renames, with the old folder at ``aside`` in between.
    """
    rename = find("renameat2")
    if rename is not None:
        failure = failure_of(rename, _AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE)
        if not failure:
            return
        if failure not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(failure, os.strerror(failure))
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:
        os.rename(aside, old)
        raise
    os.rename(aside, new)


def restore(aside: Path, old: Path) -> bool:
    """Undo a two-step exchange that was killed between its renames; returns whether there was one."""
    if not is_own_folder(aside):
        return False
    if old.exists():
        remove(aside)
        return False
    os.rename(aside, old)
    return True


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
