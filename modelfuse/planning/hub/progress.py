"""Display of progress and notes while models are fetched."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

Advance = Callable[[int], None]


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


class FetchDisplay(NamedTuple):
    """Shows progress and notes.

    Attributes:
        fetching: Called with the total bytes to fetch. The context's value is called with the bytes fetched since the
            last call, from several threads. None: huggingface_hub shows its own progress bars.
        tell: Called with a note for the user.
    """

    fetching: Callable[[int], AbstractContextManager[Advance]] | None = None
    tell: Callable[[str], None] = _warn


QUIET = FetchDisplay(lambda _: nullcontext(lambda _: None), lambda _: None)
