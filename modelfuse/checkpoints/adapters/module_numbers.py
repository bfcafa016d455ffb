"""Ranks and alphas of single modules, which a configuration gives by patterns of names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from modelfuse.checkpoints.name_patterns import Patterns, UnsupportedPattern
from modelfuse.errors import CheckpointError
from modelfuse.storage import PathOrUrl


class ByPattern:
    """Numbers by regular expressions that match a module's name, or the part after any dot, as in PEFT.

    Args:
        file: The configuration file.
        key: The name of the setting.
        values: The numbers by expression; the first match applies.

    Raises:
        CheckpointError: If an expression is invalid, or cannot be matched in bounded time.
    """

    def __init__(self, file: PathOrUrl, key: str, values: Mapping[str, float]) -> None:
        self._file, self._key, self._values = file, key, list(values.values())
        with self._told():
            self._patterns = Patterns(list(values), suffixes=True)
        self._known: dict[str, float | None] = {}

    def of(self, module: str, usual: float) -> float:
        """The number of one module; ``usual`` if none matches."""
        if module not in self._known:
            with self._told():
                fitting = self._patterns.fitting(module)
            self._known[module] = self._values[min(fitting)] if fitting else None
        found = self._known[module]
        return usual if found is None else found

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except UnsupportedPattern as error:
            raise CheckpointError(f"{self._file}: {self._key} is {error}") from None
