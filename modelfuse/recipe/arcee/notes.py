"""Notes on parts of a configuration that have no effect."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches


@dataclass(slots=True)
class Notes:
    """Distinct notes on a configuration.

    Attributes:
        lines: The notes so far.
    """

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        """Add a note."""
        if line not in self.lines:
            self.lines.append(line)

    def unknown(
        self, given: Mapping[object, object], known: Collection[str], where: str, parameters: Collection[str] = ()
    ) -> None:
        """Add notes on the keys of a map that are not used.

        >>> notes = Notes()
        >>> notes.unknown({"densty": 1}, ("density", "weight"), "models[0].parameters")
        >>> notes.lines
        ["The key 'densty' of models[0].parameters has no effect; is 'density' meant?"]

        Args:
            given: The map.
            known: The keys that are used.
            where: The map's path in the configuration; empty for the root.
            parameters: The keys that are used in ``parameters:`` below it.
        """
        for key in given:
            if key not in known:
                close = get_close_matches(str(key), [*known, *parameters], n=1, cutoff=0.6)
                guess = f"; is {close[0]!r} meant?" if close else ""
                if close and close[0] not in known:
                    guess = f"; put {close[0]} under parameters:"
                self.add(f"The key {str(key)!r}{f' of {where}' if where else ''} has no effect{guess}")
