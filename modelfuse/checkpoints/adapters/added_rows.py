"""Embeddings and heads with other rows than the base's, of which an adapter has copies, as it was trained on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.checkpoints.adapters.base_names import Targets
from modelfuse.checkpoints.adapters.changed_base import SummedTensor, TrainedRowsTensor
from modelfuse.checkpoints.adapters.computed_tensors import LowRankTensor
from modelfuse.checkpoints.adapters.heads import has_other_rows
from modelfuse.checkpoints.adapters.tensor_roles import AdapterContents
from modelfuse.checkpoints.ties import pair_of


def with_added_rows(
    base: Checkpoint, contents: AdapterContents, targets: Mapping[str, Targets]
) -> tuple[Checkpoint, dict[str, StoredTensor]]:
    """The base as the adapter was trained on it: with the matrices that it has copies of, if those have other rows.

    Returns:
        The base, and those matrices by their names in it; where it is tied, both ends.
    """
    grown = {
        target.name: replace(tensor, name=target.name)
        for name, tensor in contents.copies.items() if name not in contents.whole
        for target in targets[name]
        if target[1:] == (None, None, None) and has_other_rows(target.name, tensor, base[target.name])
    }  # fmt: skip
    replaced = {target.name for name in contents.whole for target in targets[name]}
    pair = pair_of(base) if grown else None
    if pair is not None and pair.head in base.tensors:
        ends = (pair.embedding, pair.head)
        for one, other in (ends, ends[::-1]):
            shared = replace(base.tensors[one], name=other) == base.tensors[other]
            if shared and one in grown and other not in (*grown, *replaced):
                grown[other] = replace(grown[one], name=other)
    return replace(base, tensors={**base.tensors, **grown}) if grown else base, grown


def as_trained(grown: Mapping[str, StoredTensor], changed: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """What becomes of those matrices: whole weights, as the base has no such rows that differences could go into."""
    rows = [each for each in map(changed.get, grown) if isinstance(each, TrainedRowsTensor)]
    found: dict[str, StoredTensor] = {}
    for name, tensor in grown.items():
        other = changed.get(name)
        if isinstance(other, LowRankTensor):
            other = SummedTensor.of(tensor, other)
        elif other is None:  # Of a tied pair PEFT trains the same rows of both ends.
            twin = next((each for each in rows if replace(each.base, name=name) == tensor), None)
            other = replace(twin, name=name) if twin is not None else tensor
        found[name] = other
    return found
