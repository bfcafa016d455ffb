"""The draft of a mergekit configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from modelfuse.checkpoints import CONFIG_FILE, Checkpoint
from modelfuse.checkpoints.tensor_names import group_names
from modelfuse.planning.adapter_inputs import copied_base_tensors
from modelfuse.planning.arcee.intermediate import intermediate
from modelfuse.planning.arcee.models import Inputs, OpenModel, stacks_of
from modelfuse.planning.arcee.operations import OperationBuilder
from modelfuse.planning.arcee.side_files import plan_side_files
from modelfuse.planning.arcee.tensors import Arrangement, arrange
from modelfuse.planning.arcee.vocabulary import open_vocabulary
from modelfuse.planning.drafts import Draft
from modelfuse.planning.input_comparison import compare_inputs
from modelfuse.planning.matching import find_equal_pairs
from modelfuse.planning.output_format import OutputFormat
from modelfuse.recipe.arcee.configuration import Configuration
from modelfuse.recipe.arcee.references import Reference
from modelfuse.recipe.recipe import Recipe

#: The file in the output with the configuration as given.
CONFIGURATION_FILE = "mergekit_config.yml"
#: The reason for tensors of layers that are in no slice.
NOT_TAKEN = "no slice contains it"


def draft_of(recipe: Recipe) -> Draft:
    """Open the models of a configuration, headers only, and plan every tensor.

    Raises:
        CheckpointError: If an input is missing or malformed.
        MismatchError: If the models do not fit together; all differences are listed.
        RecipeError: If a parameter is missing or invalid.
    """
    inputs = Inputs(recipe)
    wanted = recipe.configuration
    for document in recipe.configurations.documents:
        merge = _Merge(recipe, document, inputs)
        if document is wanted:
            return merge.draft()
        inputs.stages[document.name or ""] = merge.as_model()
    raise AssertionError("the result is among the documents")


class _Merge:
    """The merge of one document."""

    def __init__(self, recipe: Recipe, document: Configuration, inputs: Inputs) -> None:
        self._recipe, self._document, self._inputs = recipe, document, inputs
        self.models = inputs.models_of(document)
        self.donor = next(iter(self.models.values()))
        self._vocabulary = open_vocabulary(document.tokenizer, self.models, document.base_model)
        self._arrangement = arrange(document, self.models, self.donor)
        self._builder = OperationBuilder(recipe, document, self.models, self._vocabulary)
        self.operations = self._builder.build(self._arrangement)
        self._format = OutputFormat.of(recipe, self.donor.checkpoint)
        self.files = plan_side_files(
            recipe, document, list(self.models.values()), self.donor, self._arrangement, self.operations,
            self._vocabulary, self._format,
        )  # fmt: skip

    def as_model(self) -> OpenModel:
        """The result as an input of other documents."""
        config = json.loads(self.files.made.get(CONFIG_FILE, b"{}"))
        checkpoint = intermediate(self.donor.checkpoint, self.operations, config)
        return OpenModel(
            self.donor.reference, self.donor.number, checkpoint, None, stacks_of(checkpoint),
            {**self.donor.made, **self.files.made},
        )  # fmt: skip

    def draft(self) -> Draft:
        """The result as the output."""
        recipe, document, arrangement = self._recipe, self._document, self._arrangement
        tied, files = tuple(self._builder.tied), self.files
        inputs = self._inputs.checkpoints
        pairs = (
            *find_equal_pairs([model.checkpoint for model in self.models.values()], tied),
            *copied_base_tensors(inputs),
        )
        notes = (*document.notes, *files.notes, *(self._vocabulary.notes if self._vocabulary else ()),
                 *_left_out(arrangement), *_dropped(self._builder.dropped))  # fmt: skip
        if recipe.model_card:
            files.put(CONFIGURATION_FILE, (recipe.mergekit or "").encode(errors="backslashreplace"))
        base = None if document.base_model is None else self.models[document.base_model].number
        # mergekit checks no configurations; with chosen layers or several documents, differences are expected.
        alone = len(recipe.configurations.documents) == 1
        warnings = compare_inputs(recipe.changed(allow_mismatch=True), inputs) if alone and arrangement.is_whole else ()
        reported = _with_left_out(inputs, self.models, arrangement) if alone else inputs
        return Draft(
            reported, self.operations, tied, pairs, self._format, tuple(files.copied), files.made, notes, base, warnings
        )


def _dropped(names: list[str]) -> list[str]:
    return [f"Left out, as only some models have them: {', '.join(group_names(names))}."] if names else []


def _left_out(arrangement: Arrangement) -> list[str]:
    return [f"{reference}: no slice contains {', '.join(group_names(names))}."
            for reference, names in arrangement.left_out.items()]  # fmt: skip


def _with_left_out(
    inputs: tuple[Checkpoint, ...], models: Mapping[Reference, OpenModel], arrangement: Arrangement
) -> tuple[Checkpoint, ...]:
    """The inputs with tensors of layers that are in no slice marked as left out."""
    marked = list(inputs)
    for reference, names in arrangement.left_out.items():
        model = models[reference]
        if model.adapter is not None:
            continue
        own = marked[model.number]
        kept = {name: tensor for name, tensor in own.tensors.items() if name not in names}
        marked[model.number] = replace(own, tensors=kept, left_out={**own.left_out, **dict.fromkeys(names, NOT_TAKEN)})
    return tuple(marked)
