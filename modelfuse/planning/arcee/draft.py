"""A recipe with a configuration as a draft of its plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from modelfuse.checkpoints import Checkpoint
from modelfuse.checkpoints.tensor_names import group_names
from modelfuse.errors import RecipeError
from modelfuse.planning.adapter_inputs import copies
from modelfuse.planning.arcee.files import files_beside
from modelfuse.planning.arcee.models import OpenModel, open_models
from modelfuse.planning.arcee.operations import Operations
from modelfuse.planning.arcee.tensors import Arrangement, arrange
from modelfuse.planning.arcee.vocabulary import open_vocabulary
from modelfuse.planning.drafts import Draft
from modelfuse.planning.input_comparison import compare_inputs
from modelfuse.planning.matching import find_equal_pairs
from modelfuse.planning.output_format import OutputFormat
from modelfuse.recipe.arcee.references import Reference
from modelfuse.recipe.recipe import Recipe

#: The configuration as it was given.
CONFIGURATION_FILE = "mergekit_config.yml"
#: Why a tensor is in no slice.
NOT_TAKEN = "no slice takes it"


def draft_of(recipe: Recipe) -> Draft:
    """Open the models of a configuration, headers only, and find out what becomes of every tensor.

    Raises:
        CheckpointError: If an input is missing or malformed.
        MismatchError: If the models do not fit together; all differences are listed.
        RecipeError: If a parameter is not given, or cannot be.
    """
    configurations = recipe.configurations
    if len(configurations.documents) > 1:
        raise RecipeError("The configuration has several documents", "Merge one after the other.")
    configuration = configurations.result
    inputs, models = open_models(recipe, configurations)
    donor = next(iter(models.values()))
    vocabulary = open_vocabulary(configuration.tokenizer, models, configuration.base_model)
    arrangement = arrange(configuration, models, donor)
    maker = Operations(recipe, configuration, models, vocabulary)
    operations = maker.made(arrangement)
    form = OutputFormat.of(recipe, donor.checkpoint)
    files = files_beside(recipe, configuration, list(models.values()), donor, arrangement, operations, vocabulary, form)
    tied = tuple(maker.tied)
    pairs = (*find_equal_pairs([model.checkpoint for model in models.values()], tied), *copies(inputs))
    notes = (*configuration.notes, *files.notes, *(vocabulary.notes if vocabulary else ()), *_left_out(arrangement))
    told = _with_left_out(inputs, models, arrangement)
    if recipe.model_card:
        files.put(CONFIGURATION_FILE, (recipe.mergekit or "").encode(errors="backslashreplace"))
    base = None if configuration.base_model is None else models[configuration.base_model].number
    # mergekit merges whatever models differ in; where layers are chosen, they may well.
    warnings = compare_inputs(recipe.changed(allow_mismatch=True), inputs) if arrangement.is_whole else ()
    return Draft(told, operations, tied, pairs, form, tuple(files.copied), files.made, notes, base, warnings)


def _left_out(arrangement: Arrangement) -> list[str]:
    return [f"{reference}: no slice takes {', '.join(group_names(names))}."
            for reference, names in arrangement.left_out.items()]  # fmt: skip


def _with_left_out(
    inputs: tuple[Checkpoint, ...], models: Mapping[Reference, OpenModel], arrangement: Arrangement
) -> tuple[Checkpoint, ...]:
    """The inputs, those of their tensors that no slice takes told as left out."""
    told = list(inputs)
    for reference, names in arrangement.left_out.items():
        model = models[reference]
        if model.adapter is not None:
            continue
        own = told[model.number]
        kept = {name: tensor for name, tensor in own.tensors.items() if name not in names}
        told[model.number] = replace(own, tensors=kept, left_out={**own.left_out, **dict.fromkeys(names, NOT_TAKEN)})
    return tuple(told)
