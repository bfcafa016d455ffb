"""Names of the files that a merge writes; only these may be replaced by another output."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from modelfuse.errors import OutputError

CONFIG_NAME = "merge_config.json"
REPORT_NAME = "merge_report.json"
#: Files that a merge writes, and files that a loader would mistake for them.
MADE = re.compile(
    r"(model|master_weights|pytorch_model|model_state|diffusion_pytorch_model)(\.[\w-]+)?(-\d+-of-\d+)?"
    r"\.(safetensors|bin|pdparams)(\.index(\.[\w-]+)?\.json)?"
    r"|merge_(config|report)\.json"
)
#: Usual names of the other files of an output: adapters, configuration, tokenizers, processors, code.
USUAL = re.compile(
    r"adapter_(model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|config\.json)"
    r"|(config|generation_config|special_tokens_map|added_tokens|vocab|modules|params|tekken)\.json"
    r"|tokenizer\w*\.(json|model)|(spiece|sentencepiece\.bpe|source|target)\.(model|spm)|(vocab|merges)\.txt"
    r"|[\w.-]+\.tiktoken|chat_template\.(json|jinja)|additional_chat_templates/[^/]+\.jinja"
    r"|(pre|video_pre|audio_pre)?processor_config\.json|(sentence_bert_config|config_sentence_transformers)\.json"
    r"|(configuration|modeling|tokenization|processing|image_processing|generation)_\w+\.py"
)
#: The largest valid report in bytes.
LARGEST_REPORT = 256_000_000
#: The most files that an error names.
MOST_NAMED = 4


def check_replaceable(folder: Path) -> None:
    """Refuse to replace a folder that holds anything no merge has written.

    Raises:
        OutputError: Naming some of what would be lost.
    """
    known = _reported(folder)
    found: list[str] = []
    for name in _files_in(folder):
        if name not in known and not MADE.fullmatch(name) and not USUAL.fullmatch(name):
            found.append(name)
            if len(found) > MOST_NAMED:
                break
    if found:
        more = " and more" if len(found) > MOST_NAMED else ""
        raise OutputError(
            f"output_path {folder} holds files that no merge has written, and --overwrite would delete them: "
            f"{', '.join(sorted(found[:MOST_NAMED]))}{more}",
            "Choose another output_path, or move them away.",
        )


def _reported(folder: Path) -> set[str]:
    """The files that a folder's report lists; empty without a report."""
    path = folder / REPORT_NAME
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_REPORT:
            return set()
        report = json.loads(path.read_bytes())
        return {*map(str, report["sha256"]), *map(str, report["files"])}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return set()


def _files_in(folder: Path) -> Iterator[str]:
    """Relative paths of all files in a folder and its subfolders; links are not followed."""
    for parent, folders, files in os.walk(folder, onerror=_cannot_look):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in (*files, *links):
            yield os.path.relpath(os.path.join(parent, name), folder)


def _cannot_look(error: OSError) -> None:
    raise OutputError(
        f"{error.filename}: {error.strerror}, so what --overwrite would delete cannot be known"
    ) from error
