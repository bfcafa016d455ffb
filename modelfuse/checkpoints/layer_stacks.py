"""Find the layers of any model, by the names of its tensors and the numbers in config.json."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from modelfuse.checkpoints.tensor_names import HEADS

#: The first number in a name is that of a layer: ``model.layers.`` ``3`` ``.mlp.experts.7.w1.weight``.
_NUMBERED = re.compile(r"((?:[^.]+\.)+?)(\d+)\.(.+)")
#: Keys of config.json that count layers, and those that do not although they end alike.
_COUNTS = re.compile(r"(?:.*_)?(?:layers?|blocks|depth)")
_NO_COUNTS = re.compile(r"(?:max|first|last|num_nextn|num_mtp|every|num_dense|num_kv_shared|num_shared|global_attn)_.*"
                        r"|.*_(?:every|per|from|predict|to|at|first|last|shared)_.*")  # fmt: skip
#: Keys of the number of additional multi-token prediction layers.
NEXT_TOKENS = ("num_nextn_predict_layers", "num_mtp_layers")
#: Usual names of lists of layers, if config.json does not have their number.
_USUAL = ("layers", "layer", "h", "block", "blocks")
#: Words in names of parts that are not the language model.
_TOWERS = ("vision", "visual", "vit", "image", "audio", "speech", "video")
_PROJECTORS = ("projector", "merger", "connector", "mm_proj", "aligner")
#: Tensors before the layers; all others outside of layers come after them.
_FIRST = re.compile(r"(?:^|[._])(?:embed|emb|embedding|embeddings|embeds|wte|wpe|shared|embd)(?:[._s]|$)|embed")
#: The only module of a model with one stack; the one that holds the rest of an encoder with a decoder.
DEFAULT, SHARED, TEXT, PROJECTOR = "default", "shared", "text_decoder", "multi_modal_projector"

#: A nested key of config.json, outermost first.
ConfigKey = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack of consecutive layers.

    Attributes:
        module: The name of its part of the model in mergekit configurations.
        prefix: The prefix of the layers' names, up to the index.
        root: The prefix of all names of that part.
        count: The number of layers, without multi-token prediction layers after them.
        keys: The keys of config.json with their number.
    """

    module: str
    prefix: str
    root: str
    count: int
    keys: tuple[ConfigKey, ...]

    def layer_of(self, name: str) -> int | None:
        """The index of the layer that a tensor belongs to; None if it is not in this stack."""
        match = _NUMBERED.match(name)
        return int(match[2]) if match is not None and match[1] == self.prefix else None

    def renamed(self, name: str, layer: int) -> str:
        """The name of the corresponding tensor of another layer."""
        match = _NUMBERED.match(name)
        return name if match is None else f"{match[1]}{layer}.{match[3]}"


def comes_first(name: str) -> bool:
    """Whether a tensor outside the layers comes before them.

    >>> [comes_first(name) for name in ("model.embed_tokens.weight", "model.norm.weight", "embed_out.weight")]
    [True, False, False]
    """
    return not name.endswith(HEADS) and _FIRST.search(name) is not None


def find_stacks(names: Collection[str], config: Mapping[str, object]) -> tuple[Stack, ...]:
    """The stacks of layers of a model.

    >>> names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
    >>> find_stacks([*names, "model.norm.weight"], {"num_hidden_layers": 3})[0].keys
    (('num_hidden_layers',),)

    Args:
        names: The names of its tensors.
        config: The content of its config.json.
    """
    layers = dict[str, set[int]]()
    for name in names:
        if (match := _NUMBERED.match(name)) is not None:
            layers.setdefault(match[1], set()).add(int(match[2]))
    counts = dict(_counts(config))
    beyond = sum(value for key, value in _numbers(config) if key[-1] in NEXT_TOKENS)
    found = list[tuple[str, int]]()
    for prefix, numbers in layers.items():
        most = len(numbers)
        if numbers != set(range(most)):
            continue
        fitting = [value for value in counts.values() if most - beyond <= value <= most]
        if fitting:
            found.append((prefix, max(fitting) if most in fitting else min(fitting)))
        elif prefix.split(".")[-2] in _USUAL and not any(prefix.startswith(other) for other, _ in found):
            found.append((prefix, most))
    found = [each for each in found if not any(each[0] != other and each[0].startswith(other) for other, _ in found)]
    return tuple(_stack(prefix, count, [each for each, _ in found], counts) for prefix, count in found)


def _stack(prefix: str, count: int, prefixes: Collection[str], counts: Mapping[ConfigKey, int]) -> Stack:
    words = prefix.rstrip(".").split(".")
    keys = _keys_of(words, [key for key, value in counts.items() if value == count])
    if len(prefixes) == 1:
        return Stack(DEFAULT, prefix, "", count, keys)
    for number, word in enumerate(words):
        if _is_tower(word):
            return Stack(word, prefix, ".".join(words[: number + 1]) + ".", count, keys)
    for number, word in enumerate(words):
        if word in ("encoder", "decoder"):
            return Stack(word, prefix, ".".join(words[: number + 1]) + ".", count, keys)
    root = ".".join(words[: words.index("language_model") + 1]) + "." if "language_model" in words else prefix
    return Stack(TEXT, prefix, root, count, keys)


def _is_tower(text: str) -> bool:
    return any(word in text.lower() for word in _TOWERS)


def _keys_of(words: Collection[str], keys: Collection[ConfigKey]) -> tuple[ConfigKey, ...]:
    """Of the keys with the right number, those that describe this stack."""
    tower = any(map(_is_tower, words))
    about = [key for key in keys if any(map(_is_tower, key)) == tower]
    if tower:
        return tuple(about or keys)
    side = next((word for word in ("decoder", "encoder") if word in words), None)
    other = {"decoder": "encoder", "encoder": "decoder"}.get(side or "")
    if side is None or other is None:
        return tuple(about)
    named = [key for key in about if any(side in part for part in key)]
    if side == "encoder":
        named += [key for key in about if not any(side in part or other in part for part in key)]
    return tuple(named or [key for key in about if not any(other in part for part in key)])


def module_of(name: str, stacks: Collection[Stack]) -> str:
    """The part of a model that a tensor belongs to, as named in mergekit configurations."""
    if len(stacks) == 1:
        return next(iter(stacks)).module
    inside = [stack for stack in stacks if name.startswith(stack.root)]
    if inside:
        return max(inside, key=lambda stack: len(stack.root)).module
    if any(stack.module in ("encoder", "decoder") for stack in stacks):
        return SHARED
    modules = {stack.module for stack in stacks}
    if any(word in name for word in _PROJECTORS):
        return PROJECTOR
    return TEXT if TEXT in modules or not modules else DEFAULT


def _counts(config: Mapping[str, object]) -> Iterator[tuple[ConfigKey, int]]:
    for key, value in _numbers(config):
        if value > 0 and _COUNTS.fullmatch(key[-1]) and not _NO_COUNTS.fullmatch(key[-1]):
            yield key, value


def _numbers(config: Mapping[str, object], outside: ConfigKey = ()) -> Iterator[tuple[ConfigKey, int]]:
    """All integers in config.json, with their keys."""
    for key, value in config.items():
        if type(value) is int:
            yield (*outside, key), value
        elif isinstance(value, dict) and len(outside) < 3:
            yield from _numbers(value, (*outside, key))
