"""What a grammar makes of a request: everything of a plan but places in files, memory and workers."""

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
    """A merge without the details of how it is done.

    Attributes:
        models: The inputs in the recipe's order.
        operations: How each tensor is made.
        tied: Names that are left out, as they are another tensor's.
        equal_pairs: Tensors of the inputs that must be equal.
        format: How the output is stored.
        side_files: Files to copy.
        made_files: Files with their content.
        notes: What the user should know.
        base: The number of the input that differences are taken to, if there is one.
        warnings: What they should look at.
        modules: Weight files of modules, merged when they are written.
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
    """The models with the vocabulary that is asked for, and as they are; its files, and what the user should know."""
    if recipe.tokenizer is None:
        return models, models, {}, ()
    from modelfuse.planning.output_vocabulary import rearranged_models

    return rearranged_models(recipe, models)
