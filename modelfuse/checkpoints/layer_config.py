"""Adapt config.json to rearranged layers: their number, and per-layer settings."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from modelfuse.checkpoints.layer_stacks import NEXT_TOKENS, ConfigKey, Stack

#: Lists that may have as many entries as there are layers by chance.
_OTHER_LISTS = re.compile(r"architectures|.*token_ids?|.*section|.*_shape|.*_size_list|id2label")
#: Lists with one entry per layer, if their length matches.
_PER_LAYER = re.compile(r".*(?:layer|block|pattern|types|heads|multipliers).*")
#: A list of at least this length that matches the number of layers is per-layer, whatever its name is.
_LONG = 5
#: Lists of layer indices.
_SOME_LAYERS = re.compile(r".*(?:_layers|layers?_i\w+|block_indexes|_visual_indexes|attn_idxs)")
#: Settings with the index of the first layer of another kind, or the number of layers if there is none.
_UP_TO = ("max_window_layers",)
#: Settings that determine the kind of layers by a pattern, which cannot describe layers in another order.
_RHYTHMS = ("first_k_dense_replace", "decoder_sparse_step", "sliding_window_pattern", "full_attention_interval",
            "attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset",
            "global_attn_every_n_layers", "interleave_moe_layer_step", "no_rope_layer_interval", "moe_layer_freq",
            "num_kv_shared_layers")  # fmt: skip

#: The origin of a layer: its model's config.json, and its index there.
Origin = tuple[Mapping[str, object], int]


def with_layers(
    config: Mapping[str, object], stack: Stack, origins: Sequence[Origin]
) -> tuple[dict[str, Any], list[str]]:
    """The content of config.json for other layers.

    >>> stack = Stack("default", "h.", "", 3, (("n_layer",),))
    >>> config = {"n_layer": 3, "layer_types": ["full", "linear", "linear"]}
    >>> with_layers(config, stack, [(config, 0), (config, 2), (config, 0), (config, 2)])[0]
    {'n_layer': 4, 'layer_types': ['full', 'linear', 'full', 'linear']}

    Args:
        config: The content that it had.
        stack: The layers that it is about.
        origins: The origin of each layer of the output, in order.

    Returns:
        The new content, and notes on what it cannot express.
    """
    changed, notes = copy.deepcopy(dict(config)), list[str]()
    if not stack.keys:
        if len(origins) != stack.count:
            notes.append(f"config.json has no number of layers that is {stack.count}: none was changed")
        return changed, notes
    same = [layer for _, layer in origins] == list(range(len(origins)))
    for parent in dict.fromkeys(key[:-1] for key in stack.keys):
        part = _at(changed, parent)
        for key, value in list(part.items()):
            part[key] = _value(key, value, parent, stack.count, origins)
            if key in _RHYTHMS and value not in (None, 0, 1) and not same:
                notes.append(f"config.json says by {key}: {value} of which kind layers are, which was left as it is")
    for *parents, last in stack.keys:
        _at(changed, tuple(parents))[last] = len(origins)
    return changed, notes


def _value(key: str, value: object, parent: ConfigKey, count: int, origins: Sequence[Origin]) -> object:
    if key in _UP_TO and type(value) is int and value >= count:
        return len(origins)
    if key in NEXT_TOKENS:
        return 0
    if isinstance(value, str) and key.endswith("pattern") and len(value) == count:
        return "".join(str(each) for each in _entries(key, value, parent, origins))
    if not isinstance(value, list) or _OTHER_LISTS.fullmatch(key):
        return value
    if _SOME_LAYERS.fullmatch(key) and _are_layers(value, count):
        own = [_lookup(config, parent).get(key, value) for config, _ in origins]
        return [
            number
            for number, (_, layer) in enumerate(origins)
            if isinstance(own[number], list) and layer in own[number]
        ]
    if len(value) == count and (_PER_LAYER.fullmatch(key) or count >= _LONG):
        return list(_entries(key, value, parent, origins))
    return value


def _entries(key: str, value: Sequence[object], parent: ConfigKey, origins: Sequence[Origin]) -> Iterator[object]:
    """The entry of each layer in its own model, else the output model's entry at that index."""
    for config, layer in origins:
        own = _lookup(config, parent).get(key)
        found = own if isinstance(own, type(value)) and len(own) > layer else value
        yield found[min(layer, len(found) - 1)]


def _are_layers(value: Sequence[object], count: int) -> bool:
    """Whether these are layer indices, rather than one entry per layer."""
    numbers = [each for each in value if type(each) is int and 0 <= each < count]
    return len(numbers) == len(value) == len(set(numbers)) and (len(value) < count or numbers == sorted(numbers))


def _at(config: MutableMapping[str, Any], parent: ConfigKey) -> MutableMapping[str, Any]:
    for key in parent:
        config = config[key]
    return config


def _lookup(config: Mapping[str, Any], parent: ConfigKey) -> Mapping[str, Any]:
    for key in parent:
        config = config.get(key, {}) if isinstance(config, Mapping) else {}
    return config if isinstance(config, Mapping) else {}
