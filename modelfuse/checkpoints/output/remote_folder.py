"""An output in a store, of which a reader that starts from its index sees all or nothing.

Weight files are sent by parts while they are made, from front to back. At the end all of them are completed, then the
small files, and last what a reader starts from: the index, or the one weight file. What fails before leaves nothing
behind.
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

#: Seconds that uploads may take to be given up, before what they have sent is looked for and removed.
LEAVE = 20.0
#: The name of a weight file that is not all of a model.
SHARD = re.compile(r"-\d+-of-\d+\.\w+$")


class RemoteFolder:
    """The output while it is being made; a context manager, used as an OutputFolder is.

    Nothing of it is kept for another run. Two merges to one place at once disturb each other: the later one removes
    what the earlier one has under way, which ends with an error.

    Args:
        path: Where the output is to appear.
        overwrite: Whether it may replace what is there.
    """

    def __init__(self, path: Url, overwrite: bool = False) -> None:
        self.path, self._overwrite = path, overwrite
        self._store, self._gate = store_of(path), Gate()
        self._weights: dict[str, Upload] = {}
        self._small: dict[str, Upload] = {}
        self._old: dict[str, Entry | None] = {}
        self._completed: list[str] = []
        #: As of an OutputFolder.
        self.afresh: str | None = None
        self.digests: dict[str, str] = {}

    def __enter__(self) -> Self:
        with contextlib.suppress(ModelfuseError):  # Who may not look at what is left may still write.
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
        with contextlib.suppress(OutputError):  # What could not be removed is removed by the next run.
            self._give_up()

    def finished(self) -> Iterator[object]:
        """Nothing: an upload of an earlier run cannot be resumed."""
        return iter(())

    def create(self, name: str, frame: Frame) -> None:
        """Begin a weight file of this size with all that is no tensor's."""
        self._weights[name] = self._begin(name, frame.size)
        for offset, piece in frame.pieces:
            self.write(name, offset, memoryview(piece))
        self.digests[name] = frame.digest

    def keep(self, name: str, nbytes: int, entry: object) -> None:
        """Nothing; see :meth:`finished`."""

    def share(self) -> None:
        """Nothing: other machines send their bytes to this one."""

    def ahead(self) -> int:
        """Bytes that wait for what comes before them."""
        return self._gate.ahead

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Take bytes of a weight file; safe from any thread.

        Raises:
            OutputError: If the store does not take what was sent.
        """
        self._gate.check()
        self._weights[name].write(offset, data)

    def write_file(self, name: str, content: bytes | Iterable[bytes]) -> None:
        """Send a small file, whole or by its parts."""
        upload = self._small[name] = self._begin(name, None)
        digest, position = hashlib.sha256(), 0
        for part in (content,) if isinstance(content, bytes) else content:
            if part:
                upload.write(position, part)
                digest.update(part)
                position += len(part)
        self.digests[name] = digest.hexdigest()

    def commit(self) -> None:
        """Make everything appear: first all that is found through something else, and that last.

        Raises:
            OutputError: If that fails; nothing of the output is then there.
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
        # Whoever starts from the new index finds none of these.
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
        """What is there of an earlier output: weights and their indexes, and what its report names."""
        known = {name for name in self._old if is_weights(name)}
        if REPORT_NAME in self._old:
            with contextlib.suppress(Exception):  # A report that cannot be read names nothing.
                known |= set(json.loads(read_whole(self.path / REPORT_NAME))["sha256"]) & set(self._old)
        return known


#: An output on this machine or in a store.
Output = OutputFolder | RemoteFolder
