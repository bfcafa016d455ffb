"""What PaddleFormers states of its models' weights: which are transposed, which are fused, and what they are called.

``paddleformers.json`` is made of that by ``tools/paddleformers_layouts.py``. A line of it is one statement: names as
Hugging Face has them, ``^T`` behind those that are transposed, and what they become if that is called otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from msgspec import Struct, field

from modelfuse.checkpoints.name_rules import key_of

#: Architectures that are stored as others are.
SAME = {"mistral": "llama"}
#: The layout of models that run anywhere, and of those that are built with paddlefleet.
PLAIN, FLEET = "plain", "fleet"

_TABLE: Mapping[str, Mapping[str, list[str]]] = json.loads(
    Path(__file__).with_name("paddleformers.json").read_text(encoding="utf-8")
)["architectures"]
#: Architectures whose names are known in both worlds.
ARCHITECTURES = (*_TABLE, *SAME)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_STAR = re.compile(r"[*+]")
_PAST = re.compile(r"\blayers\.\*")
Value = TypeVar("Value")


class Weight(NamedTuple):
    """What is stated of a weight.

    Attributes:
        turned: Whether Paddle has it transposed.
        parts: Of how many of Hugging Face's weights the one is made that it is, or is a part of.
        by_head: Whether those are shared out among key-value heads.
    """

    turned: bool
    parts: int
    by_head: bool


class Stated(Struct, frozen=True, eq=False):
    """One architecture's weights in one of Paddle's layouts.

    Names are Hugging Face's here; a fused weight is called like its first part, with the fused layer's own name.

    Attributes:
        layers: How many layers the model has: those past the last may be called otherwise.
        fused: What its fused layers are called.
    """

    layers: int | None
    fused: frozenset[str]
    _weights: Mapping[str, Weight]
    _theirs: Mapping[str, str]
    _ours: Mapping[str, str]
    _patterns: dict[str, str] = field(default_factory=dict)

    @property
    def by_head(self) -> bool:
        """Whether each key-value head's queries, keys and values are together."""
        return any(weight.by_head for weight in self._weights.values())

    def weight(self, name: str) -> Weight | None:
        """What is stated of a weight; of a bias that none is stated of, what is stated of the weight beside it."""
        for each in (name, f"{name.removesuffix('bias')}weight" if name.endswith(".bias") else name):
            found = self._find(self._weights, each)
            if found is not None:
                return found
        return None

    def in_hugging_face(self, name: str) -> str:
        """Paddle's name as Hugging Face has it."""
        return self._named(self._ours, name)

    def in_paddle(self, name: str) -> str:
        """Hugging Face's name as Paddle has it."""
        return self._named(self._theirs, name)

    def _named(self, names: Mapping[str, str], name: str) -> str:
        pattern = self._find(names, name) if names else None
        if pattern is None:
            return name
        numbers = iter(_NUMBER.findall(name))
        return _STAR.sub(lambda _: next(numbers), pattern)

    def _find(self, table: Mapping[str, Value], name: str) -> Value | None:
        pattern = _NUMBER.sub("*", name)
        key = self._patterns.get(pattern)
        if key is None:
            key = self._patterns[pattern] = key_of(pattern)
        numbers = _NUMBER.search(name)
        if self.layers is not None and numbers is not None and int(numbers[0]) >= self.layers:
            past = table.get(_PAST.sub("layers.+", key, count=1))
            if past is not None:
                return past
        return table.get(key)


@cache
def stated(architecture: str | None, layers: int | None = None, layout: str = PLAIN) -> Stated | None:
    """What is stated of an architecture in one of its layouts; None if nothing is."""
    lines = _TABLE.get(SAME.get(architecture or "", architecture or ""), {}).get(layout)
    if lines is None:
        return None
    weights: dict[str, Weight] = {}
    theirs: dict[str, str] = {}
    ours: dict[str, str] = {}
    fused: set[str] = set()
    for parts, turned, made, order in map(_read, lines):
        weight, name = Weight(turned, len(parts), order == "by head"), parts[0]
        if len(parts) > 1:
            fused.add(made.split(".")[-2])
            name = ".".join((*name.split(".")[:-2], *made.split(".")[-2:]))
        weights |= {key_of(each): weight for each in (*parts, name)}
        if name != made:
            theirs[key_of(name)], ours[key_of(made)] = made, name
    return Stated(layers, frozenset(fused), weights, theirs, ours)


def _read(line: str) -> tuple[list[str], bool, str, str]:
    """The parts' names, whether they are transposed, what they become, and how they are fused.

    >>> _read("a.x.weight^T, a.y.weight^T -> a.xy.weight, in order")
    (['a.x.weight', 'a.y.weight'], True, 'a.xy.weight', 'in order')
    """
    left, _, right = line.partition(" -> ")
    names = [each.removesuffix("^T") for each in left.split(", ")]
    made, _, order = right.partition(", ")
    return names, left.endswith("^T"), made or names[0], order


def layout_of_names(architecture: str | None, names: Iterable[str]) -> str:
    """Which of Paddle's layouts names are in: those of models that are built with paddlefleet show it."""
    plain, fleet = stated(architecture), stated(architecture, None, FLEET)
    if plain is None or fleet is None:
        return PLAIN
    own = (name for name in names if fleet.in_hugging_face(name) != name)
    return FLEET if any(plain.in_hugging_face(name) == name for name in own) else PLAIN


def fuses_by_head(architecture: str | None) -> bool:
    """Whether Paddle keeps each key-value head's queries, keys and values together."""
    found = stated(architecture)
    return found is not None and found.by_head
