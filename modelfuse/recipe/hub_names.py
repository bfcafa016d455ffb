"""Names of models on a hub: ``organization/model``, optionally with ``@revision``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

#: What may stand before a name, so that no folder can be meant.
HUB_SCHEME = "hf://"
#: The rules of huggingface_hub's ``validate_repo_id``, with both parts required.
_NAME = re.compile(r"(?!.*(--|\.\.))\b[\w\-.]{1,96}\b/\b[\w\-.]{1,96}\b(?<!\.git)", re.ASCII)
#: A subset of git's names of branches, tags and commits, without ambiguous ones.
_REVISION = re.compile(r"(?!.*(\.\.|//))[\w](?:[\w\-./+]*[\w\-+])?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
#: Suffixes of files, which are not hub names.
_FILES = (".safetensors", ".bin", ".pdparams")


@dataclass(frozen=True, slots=True)
class HubName:
    """A model on a hub.

    >>> str(hub_name("org/model@main"))
    'org/model@main'

    Attributes:
        name: ``organization/model``.
        revision: A branch, a tag or a commit; None for the main branch. The commit, once it is resolved.
        folder: The folder of its files, once they are fetched.
    """

    name: str
    revision: str | None = None
    folder: Path | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @property
    def commit(self) -> str | None:
        """The revision, if it is a full commit hash, which identifies the files."""
        return self.revision if self.revision is not None and _COMMIT.fullmatch(self.revision) else None


def hub_name(word: str) -> HubName | None:
    """Parse a hub name; None if the word does not look like one.

    >>> hub_name("./org/model") is hub_name("models/org/model") is hub_name("org/model.safetensors") is None
    True
    >>> hub_name("hf://org/model@v2") == hub_name("org/model@v2")
    True
    """
    name, at, revision = word.removeprefix(HUB_SCHEME).partition("@")
    if _NAME.fullmatch(name) is None or name.endswith(_FILES) or (at and _REVISION.fullmatch(revision) is None):
        return None
    return HubName(name, revision if at else None)
