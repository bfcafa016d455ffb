"""Find the state dict in a pickled checkpoint, and tensors that are aliases of others."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from modelfuse.checkpoints.formats.pickle_types import Inert, Refused
from modelfuse.checkpoints.tensor_names import OTHER_HEADS, TIED_HEADS

T = TypeVar("T")

_MAX_WRAPPERS = 4
#: The most names: a model has up to a hundred thousand tensors, and each name takes some microseconds downstream.
MOST_NAMES = 250_000
#: Parts of the names of training state, which is not the model.
_TRAINING_STATE = ("optim", "sched", "scaler", "rng_state")
_SAVE_ALONE = "Save the model's state dict alone, or convert it to safetensors with the library that wrote it."


def find_state_dict(value: object, is_tensor: Callable[[object], bool]) -> dict[str, object]:
    """Find the one dict whose values are tensors.

    Training programs wrap it, as in ``{"state_dict": {...}, "optimizer": {...}}``. A wrapper is opened if exactly one
    of its entries contains tensors, not counting the state of optimizers, schedulers and random generators.

    Returns:
        The dict, including its entries without tensors.

    Raises:
        Refused: If there is no such dict, or tensors would be left out.
    """
    for _ in range(_MAX_WRAPPERS):
        seen: set[int] = set()
        if type(value) is not dict:
            raise Refused("it does not hold a dict of tensors", _SAVE_ALONE)
        if len(value) > MOST_NAMES:
            raise Refused(f"it names {len(value):,} tensors or other values, more than {MOST_NAMES:,}")
        direct = [name for name, item in value.items() if is_tensor(item)]
        if unnamed := [name for name in direct if type(name) is not str]:
            raise Refused(f"it holds a tensor under {unnamed[0]!r} instead of a name", _SAVE_ALONE)
        holders = [
            name
            for name, item in value.items()
            if not is_tensor(item) and not _is_training_state(name) and _holds_tensor(item, is_tensor, seen)
        ]
        if not holders:
            return value
        if direct or len(holders) > 1:
            shown = ", ".join(repr(name) for name in (direct[:1] + holders)[:4])
            raise Refused(f"it holds tensors in several dicts: {shown}", _SAVE_ALONE)
        value = value[holders[0]]
    raise Refused(f"its tensors lie more than {_MAX_WRAPPERS} dicts deep", _SAVE_ALONE)


def split_aliases(
    tensors: Mapping[str, T], identity: Callable[[T], Hashable | None]
) -> tuple[dict[str, T], dict[str, str]]:
    """Keep one name of each tensor.

    Of several names, the one that model libraries keep is kept: a shared or input embedding rather than an output head,
    otherwise the first.

    Args:
        tensors: All names.
        identity: Tensors with equal identities are the same; None is unique.

    Returns:
        The tensors in order, and the aliases: alias → name that was kept.
    """
    groups: dict[Hashable, list[str]] = {}
    for name, tensor in tensors.items():
        where = identity(tensor)
        groups.setdefault(name if where is None else (where,), []).append(name)
    aliases: dict[str, str] = {}
    for names in groups.values():
        if len(names) > 1:
            kept = min(names, key=_preference)
            aliases.update((name, kept) for name in names if name != kept)
    return {name: tensor for name, tensor in tensors.items() if name not in aliases}, aliases


def _preference(name: str) -> int:
    name = name.lower()
    if any(head in name for head in (*TIED_HEADS, *OTHER_HEADS)):
        return 3
    parts = name.split(".")
    if "shared" in parts:
        return 0
    return 1 if "embed" in name or "wte" in parts else 2


def _is_training_state(name: object) -> bool:
    return isinstance(name, str) and any(part in name.lower() for part in _TRAINING_STATE)


def _holds_tensor(value: object, is_tensor: Callable[[object], bool], seen: set[int]) -> bool:
    """Search containers, each only once: ``seen`` bounds the time for cycles and shared parts."""
    pending = [value]
    while pending:
        item = pending.pop()
        if is_tensor(item):
            return True
        if isinstance(item, dict | list | tuple | Inert) and id(item) not in seen:
            seen.add(id(item))
            if isinstance(item, dict):
                pending.extend(item.values())
            else:
                pending.extend(item.parts if isinstance(item, Inert) else item)
    return False
