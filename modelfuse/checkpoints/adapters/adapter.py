"""What tells that a folder is an adapter, and what an adapter is to those who merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.storage import PathOrUrl, has_file, is_dir
from modelfuse.storage.files import SourceFile

PEFT_CONFIG, PADDLE_CONFIG = "adapter_config.json", "lora_config.json"


@dataclass(frozen=True)
class Adapter(Checkpoint):
    """An adapter as a checkpoint: the base's tensors, those that it changes computed.

    Attributes:
        own: Its own files.
        account: What became of each of its tensors: the base's tensors that it went into.
        copies: Pairs of tensors that must be equal: its copy of one of the base's, and that one.
        changed: The names of the tensors of the base that it changes.
        modules: For a changed tensor, the layer's name in the model, where the adapter gives it.
        transposed: Whether the base stores Linear weights as [in, out].
        added: The names of tensors that the base lacks: the head of a task.
        resized: The names of matrices that have other rows than the base's.
        task: What it was trained for, as PEFT calls it.
    """

    own: tuple[SourceFile, ...] = ()
    account: Mapping[str, Sequence[str]] = field(default_factory=dict)
    copies: tuple[tuple[StoredTensor, StoredTensor], ...] = ()
    changed: frozenset[str] = frozenset()
    modules: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False
    added: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    task: str = ""

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Its own files, not the base's."""
        return self.own


def config_of(path: PathOrUrl) -> PathOrUrl | None:
    """The settings of the adapter at ``path``, a folder or the file with its weights; None if it is no adapter."""
    stems = ("adapter_model", "peft_model", "lora_model_state")
    folder = path if is_dir(path) else path.parent if path.name.startswith(stems) else None
    if folder is None:
        return None
    return next((folder / name for name in (PEFT_CONFIG, PADDLE_CONFIG) if has_file(folder / name)), None)
