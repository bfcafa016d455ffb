"""Which tensors of the base an adapter's layers are: the same names, other prefixes, fused layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from modelfuse.checkpoints import Checkpoint
from modelfuse.checkpoints.adapters.low_rank_terms import Cut
from modelfuse.checkpoints.layouts.tables import FUSED, PARTS, Fusion, geometry_of
from modelfuse.checkpoints.tensor_names import group_names
from modelfuse.errors import MismatchError

#: Parts of a name that a prefix may have.
DEEPEST = 3


class Share(NamedTuple):
    """Which outputs of a fused layer one of its parts has.

    Attributes:
        groups: How many times the parts follow one another.
        sizes: The relative sizes of the parts in each group.
        at: Which part it is.
        widens: Whether the base has the fused layer and the adapter the part; otherwise the reverse.
    """

    groups: int
    sizes: tuple[int, ...]
    at: int
    widens: bool

    def cut(self, outputs: int) -> Cut | None:
        """The outputs, if the adapter's layer has so many; None if they cannot be shared out so."""
        unit, rest = divmod(outputs, self.groups * (self.sizes[self.at] if self.widens else sum(self.sizes)))
        if rest or not unit:
            return None
        begin, width = sum(self.sizes[: self.at]) * unit, self.sizes[self.at] * unit
        return Cut(self.groups, sum(self.sizes) * unit, begin, width, self.widens)


class Target(NamedTuple):
    """A tensor of the base that is changed: its name, and its share if it is fused here and not there."""

    name: str
    share: Share | None = None


Targets = tuple[Target, ...]


class Names:
    """Finds the tensors of a base.

    Args:
        base: The base.
    """

    def __init__(self, base: Checkpoint) -> None:
        self._base = base

    def find(self, path: object, wanted: Sequence[str]) -> dict[str, Targets]:
        """Find each of the names, all by one change of prefix if they are not the base's own.

        Raises:
            MismatchError: If the base has none or only some of them, or several changes would do.
        """
        best: dict[str, Targets] = {}
        whole: list[dict[str, Targets]] = []
        for old, new in self._prefixes(wanted):
            found = {name: targets for name in wanted if (targets := self._targets(_renamed(name, old, new)))}
            if len(found) == len(wanted) and found not in whole:
                whole.append(found)
                if old == new == "":
                    break
            best = max(best, found, key=len)
        if len(whole) == 1:
            return whole[0]
        if whole:
            first = wanted[0]
            places = " and ".join(each[first][0].name for each in whole)
            raise MismatchError(f"The adapter {path} fits several parts of the base: its {first} may be {places}")
        raise self._unmatched(path, [name for name in wanted if name not in best], len(wanted))

    def _prefixes(self, wanted: Sequence[str]) -> Iterator[tuple[str, str]]:
        yield "", ""
        news = dict.fromkeys(prefix for name in self._base for prefix in _prefixes_of(name))
        for old in _prefixes_of(wanted[0] if wanted else ""):
            yield from ((old, new) for new in news)

    def _targets(self, name: str) -> Targets:
        if name in self._base.tensors:
            return (Target(name),)
        head, _, parameter = name.rpartition(".")
        stem, dot, module = head.rpartition(".")
        if module in FUSED:
            names = [f"{stem}{dot}{part}.{parameter}" for part in FUSED[module].parts]
            if all(each in self._base.tensors for each in names):
                return tuple(Target(each, self._share(FUSED[module], at, False)) for at, each in enumerate(names))
        fusion = PARTS.get(module)
        for fused in fusion.names if fusion is not None else ():
            whole = f"{stem}{dot}{fused}.{parameter}"
            if fusion is not None and whole in self._base.tensors:
                return (Target(whole, self._share(fusion, fusion.parts.index(module), True)),)
        return ()

    def _share(self, fusion: Fusion, at: int, widens: bool) -> Share:
        if not fusion.by_head:
            return Share(1, (1,) * len(fusion.parts), at, widens)
        _, _, heads, groups = geometry_of([self._base])
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
    """Nothing, and the first parts of a name up to a number.

    >>> list(_prefixes_of("model.layers.0.mlp.up_proj.weight"))
    ['', 'model.', 'model.layers.']
    """
    parts = name.split(".")[:-2]
    yield ""
    for count in range(1, min(DEEPEST, len(parts)) + 1):
        if parts[count - 1].isdigit():
            return
        yield ".".join(parts[:count]) + "."
