"""What matters of a comparison, in at most ten sentences."""

from __future__ import annotations

from collections.abc import Iterator

from modelfuse.inspection.diff_result import Diff

MOST_FINDINGS = 10


def findings_of(diff: Diff) -> tuple[str, ...]:
    """The sentences, the most important ones first."""
    return tuple(list(_findings(diff))[:MOST_FINDINGS])


def _findings(diff: Diff) -> Iterator[str]:
    yield from ()
