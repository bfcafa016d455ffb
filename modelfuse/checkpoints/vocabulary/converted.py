"""Tokenizers without a tokenizer.json (sentencepiece models, vocabularies of slow ones), read by transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from modelfuse.errors import CheckpointError, MissingExtraError
from modelfuse.storage import PathOrUrl, Url

#: The libraries that it takes, which are in one extra.
LIBRARIES = ("transformers", "sentencepiece")


def converted(folder: PathOrUrl, file: str) -> Mapping[str, Any]:
    """What the tokenizer.json of a model would hold. No code of the model is run.

    Args:
        folder: The model's.
        file: Which file its vocabulary is in, for errors.

    Raises:
        CheckpointError: If transformers cannot read it.
        MissingExtraError: If a library is not installed.
    """
    once = (f"convert it once with transformers, "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})")  # fmt: skip
    if missing := [name for name in LIBRARIES if find_spec(name) is None]:
        raise MissingExtraError(
            f"{folder} has no tokenizer.json, and reading {file} needs {' and '.join(missing)}, which is not installed",
            f"pip install 'modelfuse[sentencepiece]'. Or it has {file}: {once}.",
        )
    if isinstance(folder, Url):
        raise CheckpointError(f"{folder} has no tokenizer.json, and {file} is read from folders here only")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # Of several libraries, on a stranger's file.
        raise CheckpointError(
            f"{folder} has no tokenizer.json, and transformers cannot read {file}: {error}",
            f"It has {file}: {once}, with a version that can.",
        ) from error
    return content
