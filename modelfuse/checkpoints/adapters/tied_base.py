"""Adapters of models with a tied output head: an adapter that changes only one end unties both.

PEFT trains one end alone unless it is told otherwise, and its forward pass leaves the other as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.checkpoints.adapters.adapter import Adapter
from modelfuse.checkpoints.adapters.changed_base import TrainedRowsTensor
from modelfuse.checkpoints.adapters.computed_tensors import LowRankTensor
from modelfuse.checkpoints.ties import TiedPair, apart, are_equal, has_head, is_tied, pair_of


def base_for_adapters(base: Checkpoint) -> Checkpoint:
    """The base for opening adapters: with a head of its own, if it is tied to the embedding."""
    pair = pair_of(base)
    return apart(base, pair) if pair is not None and is_tied(base) else base


def settle_adapters(models: Sequence[Checkpoint], base: Checkpoint) -> tuple[Checkpoint, ...]:
    """Tie the heads again if adapters change both ends alike; if any changes one end only, untie all models.

    Args:
        models: The models in order, adapters opened over :func:`base_for_adapters`, then the base.
        base: The original base.
    """
    pair = pair_of(base)
    if pair is None or not is_tied(base) or not any(isinstance(model, Adapter) for model in models):
        return tuple(models)
    own = apart(base, pair)
    adapters = [model for model in models if isinstance(model, Adapter)]
    if all(_stays_tied(adapter, own, pair) for adapter in adapters):
        return tuple(_tied_again(model, base, pair) if isinstance(model, Adapter) else model for model in models)
    return tuple(
        _with_both_ends(model, own, pair) if isinstance(model, Adapter) else apart(model, pair) if is_tied(model)
        else model for model in models
    )  # fmt: skip


def _stays_tied(adapter: Adapter, base: Checkpoint, pair: TiedPair) -> bool:
    one, other = adapter.tensors[pair.embedding], adapter.tensors[pair.head]
    changed = [one != base.tensors[pair.embedding], other != base.tensors[pair.head]]
    if not any(changed) or adapter.added:
        return True
    if not changed[1]:  # PEFT ties rows by itself; a class without a head has nothing to untie.
        return isinstance(one, TrainedRowsTensor) or not has_head(base)
    return all(changed) and _are_the_same_change(one, other)


def _are_the_same_change(one: StoredTensor, other: StoredTensor) -> bool:
    if isinstance(one, LowRankTensor) and isinstance(other, LowRankTensor):
        same = (
            np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1]) and first[2:] == second[2:]
            for first, second in zip(one.factors(), other.factors(), strict=False)
        )  # fmt: skip
        return len(one.terms) == len(other.terms) and all(same)
    if isinstance(one, LowRankTensor) or isinstance(other, LowRankTensor):
        return False
    if isinstance(one, TrainedRowsTensor) and isinstance(other, TrainedRowsTensor):
        return one.rows == other.rows and are_equal(one.trained, other.trained)
    return type(one) is type(other) is StoredTensor and are_equal(one, other)


def _tied_again(adapter: Adapter, base: Checkpoint, pair: TiedPair) -> Adapter:
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if name != pair.head or name in base.tensors}
    if pair.head in tensors:
        tensors[pair.head] = replace(tensors[pair.embedding], name=pair.head)
    return replace(
        adapter, tensors=tensors, aliases=base.aliases, config=base.config, config_changes=base.config_changes,
        resized=tuple(name for name in adapter.resized if name in tensors),
    )  # fmt: skip


def _with_both_ends(adapter: Adapter, base: Checkpoint, pair: TiedPair) -> Adapter:
    """The adapter with its trained rows applied to the head as well."""
    one, other = adapter.tensors[pair.embedding], adapter.tensors[pair.head]
    if isinstance(one, TrainedRowsTensor) and other == base.tensors[pair.head]:
        return replace(adapter, tensors={**adapter.tensors, pair.head: replace(one, name=pair.head)})
    return adapter
