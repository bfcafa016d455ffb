"""Files and folders that are named by a path or a URL, through one set of functions.

The packages for a kind of store are imported when its first URL is used.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

from modelfuse.errors import CheckpointError
from modelfuse.storage.url import Url

__all__ = [
    "PathOrUrl",
    "Url",
    "children",
    "configure_cache",
    "exists",
    "folder_of",
    "forget",
    "has_file",
    "is_dir",
    "is_file",
    "look_up",
    "path_or_url",
    "size_of",
    "waiting_while",
]

#: A file or folder: a path on this machine, or a URL.
PathOrUrl = Path | Url

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
#: fsspec's syntax for chained URLs, such as a cache of a store or a file in an archive.
_CHAIN = re.compile(r"[a-zA-Z][a-zA-Z0-9+.:/-]*?::[a-zA-Z][a-zA-Z0-9+.-]*://")


def path_or_url(word: str | PathOrUrl) -> PathOrUrl:
    """Parse a word: with ``scheme://`` it is a URL, else a path, which is made absolute.

    >>> path_or_url("s3://models/llama/").name
    'llama'
    >>> path_or_url("file:///models/llama")
    PosixPath('/models/llama')

    Raises:
        ValueError: If it is a URL without bucket or server, or of an unknown store.
    """
    if isinstance(word, Url):
        return word
    if isinstance(word, str) and _CHAIN.match(word):
        raise ValueError("this is a chained URL; give the URL of the store alone")
    scheme = _SCHEME.match(word) if isinstance(word, str) else None
    if scheme is None:
        return Path(os.path.abspath(word))
    if scheme[1].lower() in ("file", "local"):
        return Path(os.path.abspath(unquote(str(word)[scheme.end() :])))
    return Url.parse(str(word))


def is_file(path: PathOrUrl) -> bool:
    """Whether there is a file; False if the name is too long."""
    if isinstance(path, Url):
        from modelfuse.storage.remote.open_store import store_of

        return store_of(path).entry(path) is not None
    return _answer(path, path.is_file)


#: Names of things that are not regular files, by type.
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
          stat.S_IFBLK: "a device"}  # fmt: skip


def has_file(path: PathOrUrl) -> bool:
    """Whether there is a file; anything else of that name is an error.

    Raises:
        CheckpointError: If it is a dangling link, a folder, a pipe or a device, or may not be read.
    """
    if isinstance(path, Url):
        return is_file(path)
    if _answer(path, path.is_file):
        if not os.access(path, os.R_OK):
            raise CheckpointError(f"{path}: {os.strerror(errno.EACCES)}")
        return True
    if not _answer(path, lambda: os.path.lexists(path)):
        return False
    try:
        what = _KINDS.get(stat.S_IFMT(path.stat().st_mode), "something else")
    except OSError:
        what = f"a link to {os.readlink(path)}, which does not exist"
    raise CheckpointError(f"{path} is not a regular file but {what}", "Fetch the file again, or remove it.")


def is_dir(path: PathOrUrl) -> bool:
    """Whether there is a folder; in a store: objects with that prefix."""
    return bool(children(path)) if isinstance(path, Url) else _answer(path, path.is_dir)


def folder_of(path: PathOrUrl) -> PathOrUrl:
    """The folder of a model: the path itself, or the folder that contains it if it is a file."""
    return path if is_dir(path) else path.parent


def exists(path: PathOrUrl) -> bool:
    """Whether there is a file or a folder."""
    return is_dir(path) or is_file(path) if isinstance(path, Url) else _answer(path, path.exists)


def _answer(path: Path, ask: Callable[[], bool]) -> bool:
    """Ask the system about a path; an I/O error is raised instead of counting as no."""
    try:
        return ask()
    except PermissionError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def children(folder: PathOrUrl) -> list[PathOrUrl]:
    """All files and folders directly in a folder, sorted by name; none if a store has no such folder.

    A store is asked once; the listing is cached.
    """
    if isinstance(folder, Url):
        from modelfuse.storage.remote.open_store import store_of

        return [folder / name for name in store_of(folder).listing(folder)]
    return sorted(folder.iterdir())


def look_up(folder: PathOrUrl, names: Iterable[str]) -> None:
    """Look up many files of a folder concurrently, so that later questions are answered from the cache."""
    if isinstance(folder, Url):
        from modelfuse.storage.remote.open_store import store_of

        store_of(folder).look_up(folder, names)


def size_of(file: PathOrUrl) -> int:
    """The size of an existing file in bytes."""
    if isinstance(file, Url):
        from modelfuse.storage.remote.open_store import store_of

        entry = store_of(file).entry(file)
        return 0 if entry is None else entry.size
    return file.stat().st_size


def configure_cache(nbytes: int, keeps: bool) -> None:
    """Set the capacity of the cache for ranges of remote files, if any are read.

    Args:
        nbytes: The capacity, including ranges that are being fetched.
        keeps: Whether ranges stay cached after they were read, as long as they fit.
    """
    if nbytes:
        from modelfuse.storage.remote.range_cache import RANGES

        RANGES.capacity, RANGES.keeps = nbytes, keeps


@contextmanager
def waiting_while(goes_on: Callable[[], bool]) -> Iterator[None]:
    """Stop waiting for stores as soon as ``goes_on`` returns False, for the duration of the context."""
    if "modelfuse.storage.remote.range_cache" not in sys.modules:
        yield
        return
    from modelfuse.storage.remote.range_cache import RANGES

    with RANGES.waiting_while(goes_on):
        yield


def forget() -> None:
    """Drop cached listings and ranges of all stores: they may have changed since the last merge."""
    if "modelfuse.storage.remote.range_cache" in sys.modules:
        from modelfuse.storage.remote.open_store import forget as forget_answers
        from modelfuse.storage.remote.range_cache import RANGES

        forget_answers()
        RANGES.forget()
