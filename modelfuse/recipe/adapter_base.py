"""Find the base that an adapter's configuration names."""

from __future__ import annotations

import json
import os
from pathlib import Path

from modelfuse.errors import RecipeError

#: The largest configuration of an adapter in bytes.
LARGEST = 10_000_000


def base_of(adapter: object) -> str:
    """The local folder of the base that a local adapter names.

    Args:
        adapter: The adapter's folder, or a file in it.

    Raises:
        RecipeError: If it names none, or one that is not on this machine.
    """
    named = _named(adapter)
    where = "lora_model_path needs base_model_path"
    if named is None:
        raise RecipeError(where, "Name the model that it was trained on.")
    if not os.path.isdir(named):
        raise RecipeError(f"{where}: {adapter} was trained on {named}", f"Name it: --base_model_path {named}.")
    return named


def _named(adapter: object) -> str | None:
    try:
        path = Path(os.fspath(adapter))  # type: ignore[call-overload]
        file = (path if path.is_dir() else path.parent) / "adapter_config.json"
        if file.stat().st_size > LARGEST:
            return None
        named = json.loads(file.read_bytes())["base_model_name_or_path"]
    except (OSError, TypeError, ValueError, KeyError, RecursionError):
        return None
    return named if isinstance(named, str) and named and named.isprintable() else None
