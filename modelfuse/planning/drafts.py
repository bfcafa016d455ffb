"""Drafts: plans without files, offsets, memory and workers. Rules and mergekit configurations both give one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from modelfuse.checkpoints import Checkpoint
from modelfuse.checkpoints.side_files import SideFile
from modelfuse.planning.matching import EqualPair, Tied
from modelfuse.planning.operations import Operation
from modelfuse.planning.output_format import OutputFormat
from modelfuse.recipe.recipe import Recipe

if TYPE_CHECKING:
    from modelfuse.checkpoints.adapters.module_file import ModuleFile


class Draft(NamedTuple):
    """A plan before tensors are assigned to files, and before memory and workers are planned.

    Attributes:
        models: The inputs in the recipe's order.
        operations: One per output tensor.
        tied: Names that the output leaves out because they share another tensor's values.
        equal_pairs: Tensors of the inputs that must be equal.
        format: The output's format.
        side_files: Files to copy.
        made_files: Names and contents of files to write.
        notes: Notes for the user.
        base: The index of the base among the inputs, if there is one.
        warnings: Warnings for the user.
        modules: Weight files of sentence-transformers modules, merged when they are written.
    """

    models: tuple[Checkpoint, ...]
    operations: list[Operation]
    tied: tuple[Tied, ...]
    equal_pairs: tuple[EqualPair, ...]
    format: OutputFormat
    side_files: tuple[SideFile, ...]
    made_files: Mapping[str, bytes]
    notes: tuple[str, ...] = ()
    base: int | None = None
    warnings: tuple[str, ...] = ()
    modules: tuple[ModuleFile, ...] = ()


def with_vocabulary(
    recipe: Recipe, models: tuple[Checkpoint, ...]
) -> tuple[tuple[Checkpoint, ...], tuple[Checkpoint, ...], Mapping[str, bytes], tuple[str, ...]]:
    """Give all models the recipe's vocabulary.

    Returns:
        The models with it; the models as they are, for the report; the vocabulary's files; and notes for the user.
    """
    if recipe.tokenizer is None:
        return models, models, {}, ()
    from modelfuse.planning.output_vocabulary import rearranged_models

    return rearranged_models(recipe, models)
