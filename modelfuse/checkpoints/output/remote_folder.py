"""An output in a store; readers that start from its index see all of it or nothing.

Weight files are uploaded in parts while they are written, in order. At the end all of them are completed, then the
small files, and last the file that a reader starts from: the index, or the only weight file. A failure before leaves
nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from modelfuse.checkpoints.made_files import REPORT_NAME
from modelfuse.checkpoints.output.atomic_folder import OutputFolder
from modelfuse.checkpoints.tensors import Frame
from modelfuse.checkpoints.weight_files import is_index, is_weights
from modelfuse.errors import ModelfuseError, OutputError
from modelfuse.storage.files import read_whole
from modelfuse.storage.remote.open_store import store_of
from modelfuse.storage.remote.uploads import Gate, Upload, begin
from modelfuse.storage.url import Entry, Url

#: Time limit in seconds for aborting uploads; leftovers are then removed.
LEAVE = 20.0
#: Names of shards.
SHARD = re.compile(r"-\d+-of-\d+\.\w+$")


class RemoteFolder:
    """An output in a store that is being written; a context manager like OutputFolder.

    It cannot be resumed. Of two concurrent merges into the same URL, the later one aborts the uploads of the earlier
    one, which then fails.

    Args:
        path: The URL of the output.
        overwrite: Whether it may replace an existing output.
    """

    def __init__(self, path: Url, overwrite: bool = False) -> None:
        self.path, self._overwrite = path, overwrite
        self._store, self._gate = store_of(path), Gate()
        self._weights: dict[str, Upload] = {}
        self._small: dict[str, Upload] = {}
        self._old: dict[str, Entry | None] = {}
        self._completed: list[str] = []
        #: See OutputFolder.
        self.restart_reason: str | None = None
        self.digests: dict[str, str] = {}

    def __enter__(self) -> Self:
        with contextlib.suppress(ModelfuseError):  # Without permission to list uploads, writing may still be allowed.
            self._store.clear(self.path)
        self._old = self._store.list_now(self.path, OutputError)
        if self._old and not self._overwrite:
            raise OutputError(f"output_path {self.path} is not empty", "Use --overwrite to replace what is there.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        with contextlib.suppress(OutputError):  # Leftovers are removed by the next run.
            self._give_up()

    def finished(self) -> Iterator[object]:
        """Nothing: an upload of an earlier run cannot be resumed."""
        return iter(())

    def create(self, name: str, frame: Frame) -> None:
        """Begin a weight file of its final size, with its frame."""
        self._weights[name] = self._begin(name, frame.size)
        for offset, piece in frame.pieces:
            self.write(name, offset, memoryview(piece))
        self.digests[name] = frame.digest

    def keep(self, name: str, nbytes: int, entry: object) -> None:
        """Nothing; see :meth:`finished`."""

    def share(self) -> None:
        """None: other machines send their output to this one."""

    def ahead(self) -> int:
        """Bytes that are buffered until those before them are written."""
        return self._gate.ahead

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes of a weight file; thread-safe.

        Raises:
            OutputError: If an upload has failed.
        """
        self._gate.check()
        self._weights[name].write(offset, data)

    def write_file(self, name: str, content: bytes | Iterable[bytes]) -> None:
        """Upload a small file, given whole or in parts."""
        upload = self._small[name] = self._begin(name, None)
        digest, position = hashlib.sha256(), 0
        for part in (content,) if isinstance(content, bytes) else content:
            if part:
                upload.write(position, part)
                digest.update(part)
                position += len(part)
        self.digests[name] = digest.hexdigest()

    def commit(self) -> None:
        """Complete all uploads; the file that readers start from is the last.

        Raises:
            OutputError: If that fails; nothing of the output is then visible.
        """
        files = {**self._weights, **self._small}
        for upload in files.values():
            upload.close()
        self._gate.drain()
        last = next((name for name in files if is_index(name)), [*self._weights][-1])
        ours = set(files)
        doors = {name for name in self._old if is_weights(name) and not SHARD.search(name)}
        replaced = self._of_an_output() - ours - doors if self._old else set[str]()
        self._store.remove(self.path, doors, OutputError)
        self._complete([upload for name, upload in self._weights.items() if name != last])
        self._complete([upload for name, upload in self._small.items() if name != last])
        self._complete([files[last]])
        # The new index does not refer to any of these.
        with contextlib.suppress(OutputError):
            self._store.remove(self.path, replaced, OutputError)
        self._store.forget()

    def _begin(self, name: str, size: int | None) -> Upload:
        return begin(self._store, self.path / name, size, self._gate, self._old.get(name))

    def _complete(self, uploads: list[Upload]) -> None:
        for upload in uploads:
            self._completed.append(upload.url.name)
            upload.begin_to_complete()
        for upload in uploads:
            upload.complete()

    def _give_up(self) -> None:
        uploads, until = [*self._weights.values(), *self._small.values()], time.monotonic() + LEAVE
        for upload in uploads:
            upload.begin_to_abandon()
        for upload in uploads:
            upload.abandon(until)
        with contextlib.suppress(ModelfuseError):
            self._store.clear(self.path)
        self._store.remove(self.path, self._completed, OutputError)

    def _of_an_output(self) -> set[str]:
        """The files of an earlier output: weights, their indexes, and those in its report."""
        known = {name for name in self._old if is_weights(name)}
        if REPORT_NAME in self._old:
            with contextlib.suppress(Exception):  # An unreadable report lists nothing.
                known |= set(json.loads(read_whole(self.path / REPORT_NAME))["sha256"]) & set(self._old)
        return known


#: An output on this machine or in a store.
Output = OutputFolder | RemoteFolder
