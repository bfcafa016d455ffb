"""Names of models on a hub: ``organization/model``, perhaps with ``@revision``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

#: What may stand before a name, so that no folder can be meant.
HUB_SCHEME = "hf://"
#: As huggingface_hub's ``validate_repo_id`` has it, with both parts.
_NAME = re.compile(r"(?!.*(--|\.\.))\b[\w\-.]{1,96}\b/\b[\w\-.]{1,96}\b(?<!\.git)", re.ASCII)
#: What git allows in the name of a branch, a tag or a commit, and nobody would take for something else.
_REVISION = re.compile(r"(?!.*(\.\.|//))[\w](?:[\w\-./+]*[\w\-+])?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
#: A word that ends so is a file that is not there.
_FILES = (".safetensors", ".bin", ".pdparams")


@dataclass(frozen=True, slots=True)
class HubName:
    """A model on a hub.

    >>> str(hub_name("org/model@main"))
    'org/model@main'

    Attributes:
        name: ``organization/model``.
        revision: A branch, a tag or a commit; None for the main branch. The commit, once its files are at hand.
        folder: Where its files are, once they are at hand.
    """

    name: str
    revision: str | None = None
    folder: Path | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @property
    def commit(self) -> str | None:
        """The revision, if it is a commit's whole hash, which always means the same files."""
        return self.revision if self.revision is not None and _COMMIT.fullmatch(self.revision) else None


def hub_name(word: str) -> HubName | None:
    """The model of that name, if a word looks like one.

    >>> hub_name("./org/model") is hub_name("models/org/model") is hub_name("org/model.safetensors") is None
    True
    >>> hub_name("hf://org/model@v2") == hub_name("org/model@v2")
    True
    """
    name, at, revision = word.removeprefix(HUB_SCHEME).partition("@")
    if _NAME.fullmatch(name) is None or name.endswith(_FILES) or (at and _REVISION.fullmatch(revision) is None):
        return None
    return HubName(name, revision if at else None)
