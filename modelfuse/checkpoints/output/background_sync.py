"""Sync finished spans to the disk in the background."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from modelfuse.storage.local.threads import join

#: Bytes of output, and seconds, between two syncs: about what a killed merge loses.
SYNC_BYTES = 64_000_000
SYNC_SECONDS = 5.0
#: The most spans between two syncs: entries of tiny tensors take more memory than the tensors.
SYNC_ENTRIES = 8192


class BackgroundSync:
    """Syncs and journals finished spans periodically, on a thread of its own, so that no worker waits for the disk.

    Args:
        keep: Syncs the named files, then writes the entries to the journal.
    """

    def __init__(self, keep: Callable[[set[str], list[object]], None]) -> None:
        self._keep = keep
        self._changed = threading.Condition()
        self._files: set[str] = set()
        self._entries: list[object] = []
        self._pending = 0
        self._since = 0.0
        self._failure: BaseException | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None

    def add(self, file: str, nbytes: int, entry: object) -> None:
        """Record a finished span of a file; thread-safe.

        Raises:
            BaseException: The error of an earlier sync.
        """
        with self._changed:
            self.check()
            if not self._entries:
                self._since = time.monotonic()
            self._files.add(file)
            self._entries.append(entry)
            self._pending += nbytes
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="keeper", daemon=True)
                # If no thread can be started, everything is synced at the end instead.
                with contextlib.suppress(RuntimeError):
                    self._thread.start()
            if len(self._entries) == 1 or self._is_due():
                self._changed.notify()

    def stop(self) -> None:
        """End the thread; the rest is left to :meth:`flush`."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None and self._thread.ident is not None:
            join([self._thread])

    def flush(self) -> None:
        """Sync and journal the rest; call after :meth:`stop`.

        Raises:
            BaseException: The error of this or an earlier sync.
        """
        self.check()
        files, entries = self._take()
        if entries:
            self._keep(files, entries)

    def check(self) -> None:
        """Check that no sync has failed: the system reports a lost write only once, to the first sync.

        Raises:
            BaseException: The error of a sync.
        """
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._stopping and not self._is_due():
                    left = self._since + SYNC_SECONDS - time.monotonic()
                    self._changed.wait(max(left, 0.001) if self._entries else None)
                if self._stopping:
                    return
                files, entries = self._take()
            try:
                self._keep(files, entries)
            except BaseException as error:
                self._failure = error
                return

    def _is_due(self) -> bool:
        entries = len(self._entries)
        if self._pending >= SYNC_BYTES or entries >= SYNC_ENTRIES:
            return entries > 0
        return entries > 0 and time.monotonic() - self._since >= SYNC_SECONDS

    def _take(self) -> tuple[set[str], list[object]]:
        taken = self._files, self._entries
        self._files, self._entries, self._pending = set(), [], 0
        return taken
