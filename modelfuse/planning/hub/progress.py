"""What is shown while models are fetched."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

Advance = Callable[[int], None]


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


class Watch(NamedTuple):
    """What is shown of the fetching.

    Attributes:
        fetching: Called with the bytes to fetch in all; gives what is called with the bytes done since the last call,
            from several threads. None: huggingface_hub shows its own bars.
        tell: Called with a sentence that the user should read.
    """

    fetching: Callable[[int], AbstractContextManager[Advance]] | None = None
    tell: Callable[[str], None] = _warn


QUIET = Watch(lambda _: nullcontext(lambda _: None), lambda _: None)
