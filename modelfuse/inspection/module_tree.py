"""The tensors of a model as a tree of modules, with repeated ones folded: ``layers.0-31``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec import Struct

from modelfuse.checkpoints import StoredTensor

#: The maximum depth of the tree; names come from untrusted files, and further parts of a name are not split.
DEEPEST = 24
#: The key of the tensor itself among a node's parts; no tensor's name has control characters.
ITSELF = "\n"
#: Most runs of numbers that are listed before an ellipsis.
MOST_RUNS = 4


class FoldedModule(Struct, frozen=True):
    """A module or, if it has a shape, a tensor; equal numbered siblings are folded into one.

    Attributes:
        name: The name within the parent; ``0-31`` for 32 equal siblings.
        copies: The number of modules that are folded into it, over all levels of its name.
        tensors: Number of tensors in all of them.
        parameters: Number of elements of these.
        bytes: Number of bytes of these as they are stored.
        dtype: The element type of a tensor; null for a module.
        shape: The shape of each tensor; null for a module.
        modules: The modules and tensors in it.
    """

    name: str
    copies: int
    tensors: int
    parameters: int
    bytes: int
    dtype: str | None = None
    shape: Sequence[int] | None = None
    modules: Sequence[FoldedModule] = ()

    def rows(self, depth: int = 0) -> Iterator[tuple[int, FoldedModule]]:
        """This module and all its descendants, depth first, each with its depth."""
        yield depth, self
        for each in self.modules:
            yield from each.rows(depth + 1)


@dataclass(slots=True)
class _Node:
    """A module before folding; equal subtrees have equal keys."""

    tensor: StoredTensor | None = None
    parts: dict[str, _Node] = field(default_factory=dict)
    key: int = 0


def tree_of(tensors: Mapping[str, StoredTensor]) -> Sequence[FoldedModule]:
    """The folded tree of a model's modules, in the order of its tensors.

    Args:
        tensors: The tensors by name.
    """
    root = _Node()
    for name, tensor in tensors.items():
        node = root
        for part in name.split(".", DEEPEST):
            node = node.parts.setdefault(part, _Node())
        node.parts[ITSELF] = _Node(tensor)  # A tensor's name may be the prefix of another one's.
    _number(root, {})
    return tuple(_folded(root, 1))


def _number(node: _Node, known: dict[object, int]) -> None:
    """Set the keys of all nodes, so that equal subtrees have equal ones."""
    if node.tensor is not None:
        content: object = (node.tensor.stored.name, node.tensor.shape)
    else:
        for part in node.parts.values():
            _number(part, known)
        content = frozenset((name, part.key) for name, part in node.parts.items())
    node.key = known.setdefault(content, len(known))


def _folded(node: _Node, times: int) -> Iterator[FoldedModule]:
    """The children of a node, with equal numbered ones folded.

    Args:
        node: The node.
        times: The number of modules of the model that it stands for.
    """
    groups: dict[object, list[str]] = {}
    for name in node.parts:
        numbered = name.isdecimal() and name.isascii()
        groups.setdefault(node.parts[name].key if numbered else name, []).append(name)
    for names in groups.values():
        name = runs(map(int, names)) if len(names) > 1 else names[0]
        yield _module(name, node.parts[names[0]], len(names), times * len(names))


def _module(name: str, node: _Node, copies: int, times: int) -> FoldedModule:
    if node.tensor is not None:
        tensor = node.tensor
        stored = tensor.stored.nbytes(tensor.size)
        return FoldedModule(name, copies, times, times * tensor.size, times * stored, str(tensor.stored), tensor.shape)
    inside = tuple(_folded(node, times))
    if len(inside) == 1:
        only = inside[0]
        together = name if only.name == ITSELF else f"{name}.{only.name}"
        return FoldedModule(together, copies * only.copies, *_numbers(inside), only.dtype, only.shape, only.modules)
    return FoldedModule(name, copies, *_numbers(inside), modules=inside)


def _numbers(modules: Sequence[FoldedModule]) -> tuple[int, int, int]:
    return (
        sum(each.tensors for each in modules),
        sum(each.parameters for each in modules),
        sum(each.bytes for each in modules),
    )


def runs(numbers: Iterable[int]) -> str:
    """Numbers as runs, abbreviated.

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
