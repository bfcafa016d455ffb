"""The tensors of a model as a tree of modules, with repeated ones folded: ``layers.0-31``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec import Struct

from modelfuse.checkpoints import StoredTensor

#: Parts of a name beyond these stay together: names are strangers' text.
DEEPEST = 24
#: What a tensor is called in its module; no name holds control characters.
ITSELF = "\n"
#: Runs of numbers that are listed.
MOST_RUNS = 4


class Module(Struct, frozen=True):
    """A module, or a tensor where it has a shape; repeated ones are one, and their numbers are added up.

    Attributes:
        name: Within its parent; ``layers.0-31`` stands for several.
        copies: How many alike modules of its parent it stands for.
        tensors: All tensors in it and its copies.
        parameters: Their elements.
        bytes: Their bytes as they are stored.
        dtype: Of a tensor, null for a module.
        shape: Of one tensor, null for a module.
        modules: What is in it.
    """

    name: str
    copies: int
    tensors: int
    parameters: int
    bytes: int
    dtype: str | None = None
    shape: Sequence[int] | None = None
    modules: Sequence[Module] = ()

    def rows(self, depth: int = 0) -> Iterator[tuple[int, Module]]:
        """This and all that is in it, each with its depth."""
        yield depth, self
        for each in self.modules:
            yield from each.rows(depth + 1)


@dataclass(slots=True)
class _Node:
    """A module that is not folded yet; its key is equal for all that look alike."""

    tensor: StoredTensor | None = None
    parts: dict[str, _Node] = field(default_factory=dict)
    key: int = 0


def tree_of(tensors: Mapping[str, StoredTensor]) -> Sequence[Module]:
    """The modules of a model, in the order of its files.

    Args:
        tensors: By name.
    """
    root = _Node()
    for name, tensor in tensors.items():
        node = root
        for part in name.split(".", DEEPEST):
            node = node.parts.setdefault(part, _Node())
        node.parts[ITSELF] = _Node(tensor)  # Another one's name may begin with all of it.
    _number(root, {})
    return tuple(_folded(root, 1))


def _number(node: _Node, known: dict[object, int]) -> None:
    """Give every module the number of its looks."""
    if node.tensor is not None:
        looks: object = (node.tensor.stored.name, node.tensor.shape)
    else:
        for part in node.parts.values():
            _number(part, known)
        looks = frozenset((name, part.key) for name, part in node.parts.items())
    node.key = known.setdefault(looks, len(known))


def _folded(node: _Node, times: int) -> Iterator[Module]:
    """The modules in one, alike ones with numbers as one.

    Args:
        node: The module.
        times: How many modules of the model it stands for.
    """
    groups: dict[object, list[str]] = {}
    for name in node.parts:
        numbered = name.isdecimal() and name.isascii()
        groups.setdefault(node.parts[name].key if numbered else name, []).append(name)
    for names in groups.values():
        name = runs(map(int, names)) if len(names) > 1 else names[0]
        yield _module(name, node.parts[names[0]], len(names), times * len(names))


def _module(name: str, node: _Node, copies: int, times: int) -> Module:
    if node.tensor is not None:
        tensor = node.tensor
        stored = tensor.stored.nbytes(tensor.size)
        return Module(name, copies, times, times * tensor.size, times * stored, str(tensor.stored), tensor.shape)
    inside = tuple(_folded(node, times))
    if len(inside) == 1:
        only = inside[0]
        together = name if only.name == ITSELF else f"{name}.{only.name}"
        return Module(together, copies * only.copies, *_numbers(inside), only.dtype, only.shape, only.modules)
    return Module(name, copies, *_numbers(inside), modules=inside)


def _numbers(modules: Sequence[Module]) -> tuple[int, int, int]:
    return (
        sum(each.tensors for each in modules),
        sum(each.parameters for each in modules),
        sum(each.bytes for each in modules),
    )


def runs(numbers: Iterable[int]) -> str:
    """Numbers in few words.

    >>> runs([0, 1, 2, 5]), runs(range(0, 40, 2))
    ('0-2,5', '0,2,4,6,…,38')
    """
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    words = [str(one) if one == last else f"{one}-{last}" for one, last in found]
    return ",".join(words if len(words) <= MOST_RUNS + 1 else [*words[:MOST_RUNS], "…", words[-1]])
