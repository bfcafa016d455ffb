"""The operations of an output that is an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from modelfuse.checkpoints import Checkpoint
from modelfuse.checkpoints.adapters.adapter import PEFT_CONFIG
from modelfuse.checkpoints.adapters.heads import has_other_rows
from modelfuse.checkpoints.tensor_names import group_names
from modelfuse.checkpoints.ties import is_tied, pair_of
from modelfuse.dtypes import OUTPUT_DTYPES
from modelfuse.errors import MismatchError
from modelfuse.methods.registry import TAKE
from modelfuse.planning.matching import Match
from modelfuse.planning.operations import Operation
from modelfuse.planning.rules import Rules, operations_of
from modelfuse.recipe.recipe import Recipe


class AdapterDraft(NamedTuple):
    """An adapter before its tensors are assigned to files.

    Attributes:
        operations: One per tensor.
        made_files: Names and contents of the files beside the weights.
        notes: Notes for the user.
    """

    operations: list[Operation]
    made_files: Mapping[str, bytes]
    notes: tuple[str, ...]


def adapter_draft(recipe: Recipe, rules: Rules, models: Sequence[Checkpoint], match: Match) -> AdapterDraft:
    """Plan an adapter.

    Raises:
        MismatchError: If the output has tensors that an adapter cannot contain.
        RecipeError: If ``lora_rank`` is needed and not given.
    """
    from modelfuse.checkpoints.adapters.as_adapter import TensorChange, as_adapter

    base = models[-1]
    if added := [name for name in match.partial if name not in base.tensors]:
        raise MismatchError(
            "An adapter cannot hold tensors that the base lacks: " + ", ".join(group_names(added)),
            "Leave them out with --missing drop, or merge into a model: leave output_format out.",
        )
    whole = {each.name: each for each in operations_of(recipe, rules, models, list(base.tensors), match.partial)}
    changes = [
        TensorChange(name, each.models, base[name], each.method or TAKE, matrices=each.matrices)
        for name, each in whole.items()
        if base[name].dtype.compute is not None and any(source != base[name] for source in each.models)
    ]
    pair = pair_of(base)
    if pair is not None and is_tied(base):  # PEFT changes only the module that it adapts; adapt the tied head, too.
        changes += [
            each._replace(name=pair.head, drawn_as=each.name) for each in changes if each.name == pair.embedding
        ]
    adapter = as_adapter(recipe, models, changes)
    dtype, inputs = OUTPUT_DTYPES[recipe.output_dtype] if recipe.output_dtype else None, (len(models) - 1,)
    operations = [
        Operation(
            each.name, dtype or each.dtype, each.shape, "take", (each,), inputs,
            method=change.method, rule=whole[change.drawn_as or change.name].rule, matrices=change.matrices,
        )
        for change, each in adapter.tensors
    ]  # fmt: skip
    operations += [replace(whole[change.drawn_as or change.name], name=name) for change, name in adapter.whole]
    return AdapterDraft(operations, {PEFT_CONFIG: adapter.config}, adapter.notes)


def resized_in_all(models: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Names of embeddings and heads that all models have with another number of rows than the base."""
    *others, base = models
    return tuple(
        name for name, tensor in base.tensors.items()
        if all(name in model.tensors and has_other_rows(name, model.tensors[name], tensor) for model in others)
    )  # fmt: skip
