"""What an adapter is to those who merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.checkpoints.files import SourceFile


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
    """

    own: tuple[SourceFile, ...] = ()
    account: Mapping[str, Sequence[str]] = field(default_factory=dict)
    copies: tuple[tuple[StoredTensor, StoredTensor], ...] = ()
    changed: frozenset[str] = frozenset()
    modules: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Its own files, not the base's."""
        return self.own
