"""Rename the tensors of all models to the names of one, by rules, a prefix, or by stacking or splitting experts.

Nothing is read or copied: a tensor gets another name, a part of one becomes a tensor, or several become one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from modelfuse.checkpoints.name_rules import by_key, key_of, part_of, told
from modelfuse.checkpoints.tensors import Checkpoint, PartialTensor, Reader, StoredTensor

#: Keys of experts: all in one tensor, or one tensor each.
ALL = re.compile(r"(?P<experts>.*\bexperts)\.(?P<fused>gate_up_proj|down_proj)")
#: The layers that are stacked in a tensor of all experts.
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
#: Limits: the number of experts; the parts of a prefix; the share of names that a prefix must match.
MOST_EXPERTS, DEEPEST, LEAST = 1 << 14, 2, 0.5


@dataclass(frozen=True, slots=True)
class BlockTensor(PartialTensor):
    """Consecutive elements of a tensor.

    Attributes:
        first: The index of the first element.
    """

    first: int

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading."""
        with self.source.open() as read:
            yield lambda start, buffer: read(self.first + start, buffer)


def with_same_names(models: Sequence[Checkpoint], lead: int) -> tuple[Checkpoint, ...]:
    """All models with the names of one of them, for equivalent tensors.

    Args:
        models: The models.
        lead: The index of the one whose names stay.
    """
    reference = models[lead]
    names = {*reference, *reference.aliases}
    others = [model is not reference and {*model, *model.aliases} != names for model in models]
    keys = by_key((*reference, *reference.aliases)) if any(others) else {}
    return tuple(
        _Renaming(model, reference, keys).done() if is_other else model
        for model, is_other in zip(models, others, strict=True)
    )


class _Renaming:
    """Renames the tensors of one model to the names of another.

    Args:
        model: The model.
        reference: The model whose names are used.
        keys: The reference's names by their keys.
    """

    def __init__(self, model: Checkpoint, reference: Checkpoint, keys: Mapping[str, str]) -> None:
        self._model, self._reference, self._keys = model, reference, keys
        self._theirs = {*reference, *reference.aliases}
        self._own = [*model, *model.aliases]

    def done(self) -> Checkpoint:
        names = self._by_rules()
        names |= self._by_prefix([name for name in self._own if name not in self._theirs and name not in names])
        model = self._renamed(names) if names else self._model
        tensors, notes = dict(model.tensors), told(names)
        for name, parts, made in (*self._fused(model), *self._apart(model)):
            for part in parts:
                tensors.pop(part, None)
            tensors |= {each.name: each for each in made}
            notes += [] if any("experts" in note for note in notes) else [f"its experts are stored otherwise: {name}"]
        return replace(model, tensors=tensors, renamed=tuple(notes)) if notes else model

    def _by_rules(self) -> dict[str, str]:
        own = by_key(self._own)
        found = {name: self._keys[key] for key, name in own.items() if name not in self._theirs and key in self._keys}
        return {name: other for name, other in found.items() if other not in own.values() and self._fits(name, other)}

    def _fits(self, name: str, other: str) -> bool:
        one, two = self._model.resolve(name), self._reference.resolve(other)
        return len(one.shape) == len(two.shape)

    def _by_prefix(self, names: Sequence[str]) -> dict[str, str]:
        """Add or remove the one prefix that matches most of the remaining names."""
        left = {key: name for key, name in self._keys.items() if name not in self._own}
        own = {key_of(name): name for name in names}
        best: dict[str, str] = {}
        for prefix in dict.fromkeys((*_prefixes(own), *_prefixes(left))):
            for on in (True, False):
                changed = {name: f"{prefix}{key}" if on else key.removeprefix(prefix) for key, name in own.items()}
                found = {name: left[key] for name, key in changed.items()
                         if key in left and self._alike(name, left[key])}  # fmt: skip
                best = max(best, found, key=len)
        return best if len(best) >= max(LEAST * len(names), 2) and len({*best.values()}) == len(best) else {}

    def _alike(self, name: str, other: str) -> bool:
        return part_of(name) == part_of(other) and self._fits(name, other)

    def _renamed(self, names: Mapping[str, str]) -> Checkpoint:
        tensors = {
            names.get(name, name): replace(tensor, name=names.get(name, name))
            for name, tensor in self._model.tensors.items()
        }
        aliases = {names.get(alias, alias): names.get(kept, kept) for alias, kept in self._model.aliases.items()}
        return replace(self._model, tensors=tensors, aliases=aliases)

    def _fused(self, model: Checkpoint) -> Iterator[tuple[str, Sequence[str], list[StoredTensor]]]:
        """Stacked tensors of all experts, from those of single experts."""
        own = by_key(model)
        for key, name in self._keys.items():
            match = ALL.fullmatch(key)
            if match is None or name in model.tensors or len(self._reference[name].shape) != 3:
                continue
            parts: list[str] = []
            for expert in range(min(self._reference[name].shape[0], MOST_EXPERTS)):
                parts += (own.get(f"{match['experts']}.{expert}.{part}.weight", "")
                          for part in PARTS[match["fused"]])  # fmt: skip
            sources = [model.tensors[part] for part in parts if part]
            wanted = self._reference[name]
            if len(sources) != len(parts) or sum(each.size for each in sources) != wanted.size:
                continue
            if any(each.shape[1:] != wanted.shape[2:] or each.dtype != sources[0].dtype for each in sources):
                continue
            from modelfuse.checkpoints.views.rearranged import WovenTensor

            first = sources[0]
            whole = WovenTensor(name, first.dtype, wanted.shape, first.file, first.offset, tuple(sources), 1)
            yield name, parts, [whole]

    def _apart(self, model: Checkpoint) -> Iterator[tuple[str, Sequence[str], list[StoredTensor]]]:
        """Tensors of single experts, from stacked ones."""
        for key, name in by_key(model).items():
            match = ALL.fullmatch(key)
            if match is None or name in self._theirs or len(model[name].shape) != 3:
                continue
            whole, parts = model[name], PARTS[match["fused"]]
            experts, rows, columns = whole.shape
            names = [self._keys.get(f"{match['experts']}.{expert}.{part}.weight", "")
                     for expert in range(min(experts, MOST_EXPERTS)) for part in parts]  # fmt: skip
            shape = (rows // len(parts), columns)
            if "" in names or any(self._reference[each].shape != shape for each in names):
                continue
            size = shape[0] * columns
            yield name, [name], [_block(whole, each, shape, at * size) for at, each in enumerate(names)]


def _block(whole: StoredTensor, name: str, shape: tuple[int, ...], first: int) -> StoredTensor:
    if type(whole) is StoredTensor:
        return StoredTensor(name, whole.dtype, shape, whole.file, whole.offset + whole.dtype.nbytes(first))
    return BlockTensor(name, whole.dtype, shape, whole.file, whole.offset, whole, first)


def _prefixes(keys: Mapping[str, str]) -> Iterator[str]:
    """Possible prefixes: leading parts of the first name, up to a number."""
    for key in list(keys)[:1]:
        parts = key.split(".")[:-2]
        for count in range(1, min(DEEPEST, len(parts)) + 1):
            if parts[count - 1].isdigit():
                return
            yield ".".join(parts[:count]) + "."
