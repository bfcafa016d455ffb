"""The files beside the output's weights: configuration, tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelfuse.checkpoints import CONFIG_FILE, read_json
from modelfuse.checkpoints.side_files import (
    GENERATION_FILE,
    SideFile,
    belongs_to_tokenizer,
    encoded_json,
    files_to_serve,
)
from modelfuse.checkpoints.vocabulary.chat_templates import TEMPLATE_FILE, template_of
from modelfuse.checkpoints.vocabulary.tokenizers import TOKENIZER_CONFIG, TOKENIZER_FILE
from modelfuse.errors import CheckpointError
from modelfuse.planning.arcee.config_json import (
    config_of_layers,
    config_of_vocabulary,
    dtype_of,
    rows_of_output,
    with_token_ids,
)
from modelfuse.planning.arcee.models import OpenModel
from modelfuse.planning.arcee.tensors import Arrangement
from modelfuse.planning.arcee.vocabulary import Vocabulary
from modelfuse.planning.operations import Operation
from modelfuse.planning.output_format import OutputFormat
from modelfuse.recipe.arcee.configuration import Configuration
from modelfuse.recipe.recipe import Recipe


@dataclass
class PlannedFiles:
    """The files beside the weights.

    Attributes:
        copied: Files to copy.
        made: Names and contents of files to write.
        notes: Notes for the user.
    """

    copied: list[SideFile]
    made: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put(self, name: str, content: bytes) -> None:
        """Add a file to write, instead of a file of that name that would be copied."""
        self.copied = [each for each in self.copied if each.name != name]
        self.made[name] = content

    def has(self, name: str) -> bool:
        """Whether a file of this name is copied or written."""
        return name in self.made or any(each.name == name for each in self.copied)


def plan_side_files(
    recipe: Recipe,
    configuration: Configuration,
    models: Sequence[OpenModel],
    donor: OpenModel,
    arrangement: Arrangement,
    operations: Sequence[Operation],
    vocabulary: Vocabulary | None,
    form: OutputFormat,
) -> PlannedFiles:
    """Plan the files beside the weights.

    Args:
        recipe: The other settings.
        configuration: The mergekit configuration.
        models: Its models.
        donor: The model whose files the output gets.
        arrangement: The output's layers.
        operations: The output's operations.
        vocabulary: Its vocabulary, if the configuration has tokenizer settings.
        form: The output's format.

    Raises:
        CheckpointError: If a file cannot be read.
        RecipeError: If the chat template is unknown.
    """
    copies = recipe.copy_tokenizer or vocabulary is not None
    files = PlannedFiles(list(files_to_serve(recipe.changed(copy_tokenizer=copies), donor.checkpoint)))
    for name, content in donor.made.items():
        files.put(name, content)
    if files.has(CONFIG_FILE):
        dtype, content = dtype_of(configuration, operations), json.dumps(dict(donor.checkpoint.config)).encode()
        config: dict[str, Any] = json.loads(form.config(content, dtype, donor.checkpoint.dequantized, {}))
        config, notes = config_of_layers(arrangement, donor, config)
        files.notes += notes
        rows = rows_of_output(operations) if recipe.truncate_embeddings else None
        files.put(CONFIG_FILE, encoded_json(config_of_vocabulary(config, operations, donor, vocabulary, rows)))
    if vocabulary is not None:
        if files.has(GENERATION_FILE):
            generation = _content(donor, GENERATION_FILE)
            files.put(GENERATION_FILE, encoded_json(with_token_ids(generation, donor, vocabulary)))
        _take_tokenizer(recipe, files, donor, vocabulary)
    if configuration.chat_template is not None:
        _put_template(files, configuration.chat_template, models, vocabulary, donor)
    return files


def _take_tokenizer(recipe: Recipe, files: PlannedFiles, donor: OpenModel, vocabulary: Vocabulary) -> None:
    """Replace the donor's tokenizer files by those of the output's vocabulary, with its added tokens."""
    output = vocabulary.output
    owner = vocabulary.owner
    if owner is not donor:
        theirs = files_to_serve(recipe.changed(copy_file_list=(), copy_tokenizer=True), owner.checkpoint)
        files.copied = [
            *(each for each in files.copied if not belongs_to_tokenizer(each.name)),
            *(each for each in theirs if belongs_to_tokenizer(each.name)),
        ]
        files.made = {name: content for name, content in files.made.items() if not belongs_to_tokenizer(name)}
        for name, content in owner.made.items():
            if belongs_to_tokenizer(name):
                files.put(name, content)
    if output.conflicts:
        shown = ", ".join(map(repr, output.conflicts[:5]))
        files.notes.append(f"Added tokens with different settings in the models get those of the first model: {shown}.")
    if not output.is_changed:
        return
    files.put(TOKENIZER_FILE, output.tokenizer_json())
    if files.has(TOKENIZER_CONFIG):
        files.put(TOKENIZER_CONFIG, encoded_json(output.tokenizer_config(_content(owner, TOKENIZER_CONFIG))))


def _content(model: OpenModel, name: str) -> dict[str, Any]:
    """The content of a JSON file of a model."""
    made = model.made.get(name)
    return dict(read_json(model.folder / name)) if made is None else dict(json.loads(made))


def _put_template(
    files: PlannedFiles, wanted: str, models: Sequence[OpenModel], vocabulary: Vocabulary | None, donor: OpenModel
) -> None:
    text = template_of(wanted, [model.folder for model in models])
    if text is None:
        files.notes.append("chat_template is auto, but no model has a chat template.")
        return
    if not files.has(TOKENIZER_CONFIG) and not files.has(TOKENIZER_FILE):
        raise CheckpointError(
            f"{donor.checkpoint.path} has no tokenizer, so the output cannot have a chat template",
            "Give a model with a tokenizer as tokenizer: source.",
        )
    files.put(TEMPLATE_FILE, text.encode())
    if files.has(TOKENIZER_CONFIG):  # Older loaders read the template from it.
        made = files.made.get(TOKENIZER_CONFIG)
        owner = donor if vocabulary is None else vocabulary.owner
        content: Mapping[str, Any] = json.loads(made) if made is not None else _content(owner, TOKENIZER_CONFIG)
        files.put(TOKENIZER_CONFIG, encoded_json({**content, "chat_template": text}))
