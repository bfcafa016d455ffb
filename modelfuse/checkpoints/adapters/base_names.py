"""Find the base's tensors for an adapter's layers: by name, by name rules, in fused layers, among experts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from modelfuse.checkpoints import Checkpoint
from modelfuse.checkpoints.adapters.low_rank_terms import FusedPart
from modelfuse.checkpoints.layouts.tables import FUSED, PARTS, Fusion, geometry_of
from modelfuse.checkpoints.name_rules import by_key, key_of, part_of
from modelfuse.checkpoints.tensor_names import group_names
from modelfuse.errors import MismatchError

#: The most parts of a prefix.
DEEPEST = 3
#: Names of stacked experts' weights, and the names of each expert's layers in them.
EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_ALL = re.compile(r"(?P<experts>.*\bexperts)\.(?P<fused>gate_up_proj|down_proj)")
_ONE = re.compile(r"(?P<experts>.*\bexperts)\.(?P<number>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.weight")
#: More experts than any model has.
MOST_EXPERTS = 1 << 14


class Share(NamedTuple):
    """The outputs of one part of a fused layer.

    Attributes:
        groups: The number of groups; in each, the parts follow one another.
        sizes: The relative sizes of the parts in each group.
        at: The index of the part.
        widens: Whether the base has the fused layer and the adapter the part; otherwise the reverse.
    """

    groups: int
    sizes: tuple[int, ...]
    at: int
    widens: bool

    def cut(self, outputs: int) -> FusedPart | None:
        """The outputs for an adapter's layer with ``outputs`` outputs; None if they cannot be divided so."""
        unit, rest = divmod(outputs, self.groups * (self.sizes[self.at] if self.widens else sum(self.sizes)))
        if rest or not unit:
            return None
        begin, width = sum(self.sizes[: self.at]) * unit, self.sizes[self.at] * unit
        return FusedPart(self.groups, sum(self.sizes) * unit, begin, width, self.widens)


class BaseTensor(NamedTuple):
    """A tensor of the base that is changed.

    Attributes:
        name: Its name.
        share: Its share, if the layer is fused only in the base or only in the adapter.
        expert: The expert whose factors change it, if the adapter stacks the factors of all experts.
        block: The expert whose part of it is changed, if the base stacks all experts in one tensor.
    """

    name: str
    share: Share | None = None
    expert: int | None = None
    block: int | None = None


Targets = tuple[BaseTensor, ...]


class Names:
    """Finds the tensors of a base.

    Args:
        base: The base.
    """

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._keys = by_key(base)

    def has(self, name: str) -> bool:
        """Whether the base has a tensor of this or an equivalent name."""
        return self.known(name) is not None

    def known(self, name: str) -> str | None:
        """The base's tensor of this or an equivalent name; None if there is none."""
        return name if name in self._base.tensors else self._keys.get(key_of(name))

    def find(self, path: object, wanted: Sequence[str]) -> dict[str, Targets]:
        """Find each of the names: unchanged, by the name rules, or for a part of the model by another prefix.

        Raises:
            MismatchError: If the base has none or only some of them, or several prefixes match.
        """
        found = {name: targets for name in wanted if (targets := self._targets(name))}
        groups: dict[frozenset[str], list[str]] = {}
        for name in wanted:
            groups.setdefault(part_of(name), []).append(name)
        for part, names in groups.items():
            if not all(name in found for name in names):
                found |= self._by_prefix(path, part, names)
        if missing := [name for name in wanted if name not in found]:
            raise self._unmatched(path, missing, len(wanted))
        return found

    def _by_prefix(self, path: object, part: frozenset[str], wanted: Sequence[str]) -> dict[str, Targets]:
        """Match names of one part of the model by the prefix that matches most of them."""
        best: dict[str, Targets] = {}
        whole: list[dict[str, Targets]] = []
        news = dict.fromkeys(prefix for name in self._base if part_of(name) == part for prefix in _prefixes_of(name))
        for old in _prefixes_of(wanted[0]):
            for new in news:
                found = {name: targets for name in wanted if (targets := self._targets(_renamed(name, old, new)))}
                if len(found) == len(wanted) and found not in whole:
                    whole.append(found)
                best = max(best, found, key=len)
        if len(whole) > 1:
            first = wanted[0]
            candidates = " and ".join(each[first][0].name for each in whole)
            raise MismatchError(f"The adapter {path} fits several parts of the base: its {first} may be {candidates}")
        return best

    def _targets(self, name: str) -> Targets:
        known = self.known(name)
        if known is not None:
            experts = self._experts_of(known) if _ALL.fullmatch(key_of(name)) else 0
            return (
                tuple(BaseTensor(known, None, each, each) for each in range(experts))
                if experts
                else (BaseTensor(known),)
            )
        return self._of_experts(key_of(name)) or self._of_fused(name)

    def _experts_of(self, name: str) -> int:
        """The number of experts that are stacked in a tensor."""
        shape = self._base[name].shape
        return shape[0] if len(shape) == 3 and shape[0] <= MOST_EXPERTS else 0

    def _of_experts(self, key: str) -> Targets:
        """Single experts' weights for the name of a stacked tensor, or an expert's part of a stacked tensor."""
        if match := _ALL.fullmatch(key):
            parts = EXPERTS[match["fused"]]
            found: list[BaseTensor] = []
            for expert in range(MOST_EXPERTS):
                names = [self.known(f"{match['experts']}.{expert}.{part}.weight") for part in parts]
                if None in names:
                    break
                found += (
                    BaseTensor(name, Share(1, (1,) * len(parts), at, False) if len(parts) > 1 else None, expert)
                    for at, name in enumerate(names) if name is not None
                )  # fmt: skip
            return tuple(found)
        if match := _ONE.fullmatch(key):
            fused, parts = next((fused, parts) for fused, parts in EXPERTS.items() if match["part"] in parts)
            whole, number = self.known(f"{match['experts']}.{fused}"), int(match["number"])
            if whole is not None and number < self._experts_of(whole):
                share = Share(1, (1,) * len(parts), parts.index(match["part"]), True) if len(parts) > 1 else None
                return (BaseTensor(whole, share, None, number),)
        return ()

    def _of_fused(self, name: str) -> Targets:
        head, _, parameter = name.rpartition(".")
        stem, dot, module = head.rpartition(".")
        if module in FUSED:
            names = [self.known(f"{stem}{dot}{part}.{parameter}") for part in FUSED[module].parts]
            known = [each for each in names if each is not None]
            if len(known) == len(names):
                return tuple(BaseTensor(each, self._share(FUSED[module], at, False)) for at, each in enumerate(known))
        fusion = PARTS.get(module)
        for fused in fusion.names if fusion is not None else ():
            whole = self.known(f"{stem}{dot}{fused}.{parameter}")
            if fusion is not None and whole is not None:
                return (BaseTensor(whole, self._share(fusion, fusion.parts.index(module), True)),)
        return ()

    def _share(self, fusion: Fusion, at: int, widens: bool) -> Share:
        if not fusion.by_head:
            return Share(1, (1,) * len(fusion.parts), at, widens)
        geometry = geometry_of([self._base])
        heads, groups = geometry.heads, geometry.key_value_heads
        if not heads or not groups or heads % groups:
            raise MismatchError(
                f"Queries, keys and values are fused, in the adapter or in the base {self._base.path}, but the base's "
                "config.json does not tell where to cut them: "
                f"num_attention_heads is {heads}, num_key_value_heads is {groups}",
                "Put the config.json of the model beside its weights.",
            )
        return Share(groups, (heads // groups, 1, 1), at, widens)

    def _unmatched(self, path: object, missing: list[str], wanted: int) -> MismatchError:
        tied = [name for name in missing if name in self._base.aliases]
        lines = [f"  {group}" for group in group_names(missing)]
        lines += [f"  ({name} shares its values with {self._base.aliases[name]} there)" for name in tied]
        number = "None" if len(missing) == wanted else f"{len(missing)} of {wanted}"
        verb = "is" if len(missing) == wanted else "are not"
        return MismatchError(
            f"{number} of the weights that the adapter {path} changes {verb} in the base {self._base.path}:\n"
            + "\n".join(lines),
            "Give the base that the adapter was trained on.",
        )


def _renamed(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def _prefixes_of(name: str) -> Iterable[str]:
    """Possible prefixes of a name: empty, and its leading parts up to a number.

    >>> list(_prefixes_of("model.layers.0.mlp.up_proj.weight"))
    ['', 'model.', 'model.layers.']
    """
    parts = name.split(".")[:-2]
    yield ""
    for count in range(1, min(DEEPEST, len(parts)) + 1):
        if parts[count - 1].isdigit():
            return
        yield ".".join(parts[:count]) + "."


def renamed_by(found: dict[str, Targets]) -> Iterator[tuple[str, str]]:
    """Pairs of names: the adapter's, and the base's if it differs."""
    for name, targets in found.items():
        if len(targets) == 1 and targets[0][1:] == (None, None, None) and targets[0].name != name:
            yield name, targets[0].name
