"""Stores that are only supported by fsspec: hdfs, ftp and a few others."""

from __future__ import annotations

import contextlib
import email.utils
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from modelfuse.storage.remote.errors import Replaced, is_missing
from modelfuse.storage.remote.stores import Content, Part, Store
from modelfuse.storage.url import Entry, Url

#: Prefix of a file's name while it is written.
HIDDEN = ".modelfuse-"
#: Keys of the modification time in the listings of fsspec's filesystems.
TIMES = ("LastModified", "mtime", "last_modified", "updated", "modified", "created", "Last-Modified")
VERSIONS = ("ETag", "etag", "generation", "versionId")


class FsspecStore(Store):
    """A store that fsspec supports. Reads cannot name a version, so the file's version is checked after reading.

    Args:
        fs: The fsspec filesystem.
    """

    def __init__(self, fs: Any) -> None:
        super().__init__()
        self._fs = fs

    def _path(self, url: Url) -> str:
        return str(self._fs._strip_protocol(url.address))

    def _ask(self, url: Url) -> Entry | None:
        try:
            found = self._fs.info(self._path(url))
        except Exception as error:
            if is_missing(error):
                return None
            raise
        return _entry(found) if found["type"] == "file" else None

    def _list(self, folder: Url) -> dict[str, Entry | None]:
        path = self._path(folder)
        try:
            found = self._fs.ls(path, detail=True, refresh=True)
        except Exception as error:
            if is_missing(error):
                return {}
            raise
        return {
            each["name"].rstrip("/").rpartition("/")[2]: _entry(each) if each["type"] == "file" else None
            for each in found
            if each["name"].strip("/") != path.strip("/")
        }

    def _range(self, url: Url, entry: Entry, start: int, end: int) -> Content:
        content: bytes = self._fs.cat_file(self._path(url), start=start, end=end)
        if self._ask(url) != entry:
            raise Replaced
        return content

    def put(self, url: Url, content: bytes) -> None:
        hidden = self._hide(url)
        self._fs.pipe_file(hidden, content)
        self._fs.mv(hidden, self._path(url))

    def put_parts(self, url: Url, parts: Iterator[Part], size: int) -> None:
        hidden = self._hide(url)
        try:
            file = self._fs.open(hidden, "wb")
            try:
                for part in parts:
                    file.write(part.data)
            finally:
                file.close()
            self._fs.mv(hidden, self._path(url))
        except BaseException:
            with contextlib.suppress(Exception):
                self._fs.rm_file(hidden)
            raise

    def _hide(self, url: Url) -> str:
        """The temporary name of a file while it is written."""
        self._fs.makedirs(self._path(url.parent), exist_ok=True)
        return self._path(url.with_name(f"{HIDDEN}{url.name}"))

    def _remove(self, url: Url) -> None:
        self._fs.rm_file(self._path(url))

    def clear(self, folder: Url) -> None:
        self.remove(folder, [name for name in self.list_now(folder) if name.startswith(HIDDEN)])


def _entry(info: Mapping[str, Any]) -> Entry:
    """Convert fsspec's description of a file."""
    modified_ns = _nanoseconds(next((info[key] for key in TIMES if info.get(key)), 0))
    versions = [str(info[key]) for key in VERSIONS if info.get(key)]
    return Entry(int(info["size"]), " ".join(versions) or str(modified_ns), modified_ns)


def _nanoseconds(moment: object) -> int:
    if isinstance(moment, str):
        try:
            moment = datetime.fromisoformat(moment)
        except ValueError:
            try:
                moment = email.utils.parsedate_to_datetime(str(moment))
            except ValueError:
                return 0
    if isinstance(moment, datetime):
        return int(moment.timestamp()) * 10**9 + moment.microsecond * 1000
    return round(moment * 1e6) * 1000 if isinstance(moment, int | float) else 0
