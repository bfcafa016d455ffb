"""JSON objects in files of limited size."""

from __future__ import annotations

import json

from modelfuse.errors import CheckpointError
from modelfuse.storage import PathOrUrl
from modelfuse.storage.files import SourceFile, read_bytes

MAX_JSON_BYTES = 256_000_000
DEEPEST = 100


def read_json(path: PathOrUrl) -> dict[str, object]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: If it is too large, not JSON, or not an object.
    """
    file = SourceFile.at(path)
    if file.size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {file.size:,} bytes, too many for a file of its kind")
    try:
        content = json.loads(read_bytes(file, 0, file.size))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    if _is_deep(content):
        raise CheckpointError(f"{path} is nested more than {DEEPEST} levels deep")
    return content


def _is_deep(content: object) -> bool:
    """Whether something is nested so deeply that whoever looks into it would come to Python's limit."""
    level = [content]
    for _ in range(DEEPEST):
        inner = [each.values() if isinstance(each, dict) else each for each in level]
        level = [part for each in inner for part in each if isinstance(part, dict | list)]  # type: ignore[attr-defined]
        if not level:
            return False
    return True
