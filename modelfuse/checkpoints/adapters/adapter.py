"""An adapter as a checkpoint, and the detection of adapter folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.storage import PathOrUrl, has_file, is_dir
from modelfuse.storage.files import SourceFile

PEFT_CONFIG, PADDLE_CONFIG = "adapter_config.json", "lora_config.json"


@dataclass(frozen=True)
class Adapter(Checkpoint):
    """An adapter as a checkpoint: the base's tensors, with those that it changes computed on read.

    Attributes:
        own: Its own files.
        account: For each of its tensors, the tensors of the base that it went into.
        copies: Pairs of tensors that must be equal: its copy of a tensor of the base, and that tensor.
        changed: The names of the tensors of the base that it changes.
        modules: For a changed tensor, the layer's name in the model, if the adapter has it.
        transposed: Whether the base stores Linear weights as [in, out].
        added: The names of tensors that the base lacks: the head of a task.
        resized: The names of matrices with another number of rows than the base's.
        task: PEFT's task type.
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
    """The configuration file of the adapter at ``path`` (a folder or weight file); None if it is not an adapter."""
    stems = ("adapter_model", "peft_model", "lora_model_state")
    folder = path if is_dir(path) else path.parent if path.name.startswith(stems) else None
    if folder is None:
        return None
    return next((folder / name for name in (PEFT_CONFIG, PADDLE_CONFIG) if has_file(folder / name)), None)
