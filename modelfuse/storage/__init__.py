"""Places that are named by a URL: what they hold, read by ranges and written by parts.

The packages of each kind of store are imported when the first URL is met.
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
    "Place",
    "Url",
    "children",
    "configure_cache",
    "exists",
    "forget",
    "has_file",
    "is_dir",
    "is_file",
    "look_up",
    "path_or_url",
    "place_of",
    "size_of",
    "waiting_while",
]

#: Where a model is or is to be: a path on this machine, or a URL.
PathOrUrl = Path | Url

#: Old names, until nothing uses them.
Place = PathOrUrl
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
#: How fsspec writes one path behind another: a cache of a store, a file in an archive.
_CHAIN = re.compile(r"[a-zA-Z][a-zA-Z0-9+.:/-]*?::[a-zA-Z][a-zA-Z0-9+.-]*://")


def path_or_url(word: str | PathOrUrl) -> PathOrUrl:
    """What a word names: with ``scheme://`` a URL, else a path, made absolute.

    >>> path_or_url("s3://models/llama/").name
    'llama'
    >>> path_or_url("file:///models/llama")
    PosixPath('/models/llama')

    Raises:
        ValueError: If it is a URL that names nothing, or is of no store.
    """
    if isinstance(word, Url):
        return word
    if isinstance(word, str) and _CHAIN.match(word):
        raise ValueError("this is a chain of places; name the URL of the store alone")
    scheme = _SCHEME.match(word) if isinstance(word, str) else None
    if scheme is None:
        return Path(os.path.abspath(word))
    if scheme[1].lower() in ("file", "local"):
        return Path(os.path.abspath(unquote(str(word)[scheme.end() :])))
    return Url.parse(str(word))


place_of = path_or_url


def is_file(path: PathOrUrl) -> bool:
    """Whether there is a file; false for a name too long for any."""
    if isinstance(path, Url):
        from modelfuse.storage.remote.open_store import store_of

        return store_of(path).entry(path) is not None
    return _answer(path, path.is_file)


#: What may have a file's name without being one.
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
          stat.S_IFBLK: "a device"}  # fmt: skip


def has_file(path: PathOrUrl) -> bool:
    """Whether there is a file; what has its name and cannot be read as one is not taken for nothing.

    Raises:
        CheckpointError: If it is a link that leads nowhere, a folder, a pipe or a device, or may not be read.
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
        what = f"a link to {os.readlink(path)}, which is not there"
    raise CheckpointError(f"{path} is not a regular file but {what}", "Fetch the file again, or remove it.")


def is_dir(path: PathOrUrl) -> bool:
    """Whether there is a folder; in a store, objects whose names begin as if there were one."""
    return bool(children(path)) if isinstance(path, Url) else _answer(path, path.is_dir)


def exists(path: PathOrUrl) -> bool:
    """Whether there is a file or a folder."""
    return is_dir(path) or is_file(path) if isinstance(path, Url) else _answer(path, path.exists)


def _answer(path: Path, ask: Callable[[], bool]) -> bool:
    """What the system says of a path; a disk that fails is not taken for one that says no."""
    try:
        return ask()
    except PermissionError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def children(folder: PathOrUrl) -> list[PathOrUrl]:
    """All files and folders directly in a folder, by their names; none if there is no such folder in a store.

    A store is asked once, and then knows all of them.
    """
    if isinstance(folder, Url):
        from modelfuse.storage.remote.open_store import store_of

        return [folder / name for name in store_of(folder).listing(folder)]
    return sorted(folder.iterdir())


def look_up(folder: PathOrUrl, names: Iterable[str]) -> None:
    """Ask for many files of a folder at once, before each is asked for."""
    if isinstance(folder, Url):
        from modelfuse.storage.remote.open_store import store_of

        store_of(folder).look_up(folder, names)


def size_of(file: PathOrUrl) -> int:
    """The size of a file that is there, in bytes."""
    if isinstance(file, Url):
        from modelfuse.storage.remote.open_store import store_of

        entry = store_of(file).entry(file)
        return 0 if entry is None else entry.size
    return file.stat().st_size


def configure_cache(nbytes: int, keeps: bool) -> None:
    """Hold so many bytes of files in stores; nothing is done if none of them is read.

    Args:
        nbytes: How many, those that are on their way included.
        keeps: Whether those that were read are kept as long as there is room.
    """
    if nbytes:
        from modelfuse.storage.remote.range_cache import RANGES

        RANGES.capacity, RANGES.keeps = nbytes, keeps


@contextmanager
def waiting_while(goes_on: Callable[[], bool]) -> Iterator[None]:
    """Give up what is waited for in stores as soon as this says so."""
    if "modelfuse.storage.remote.range_cache" not in sys.modules:
        yield
        return
    from modelfuse.storage.remote.range_cache import RANGES

    with RANGES.waiting_while(goes_on):
        yield


def forget() -> None:
    """Ask all stores anew from now on: what they hold may have changed since the last merge."""
    if "modelfuse.storage.remote.range_cache" in sys.modules:
        from modelfuse.storage.remote.open_store import forget as forget_answers
        from modelfuse.storage.remote.range_cache import RANGES

        forget_answers()
        RANGES.forget()
