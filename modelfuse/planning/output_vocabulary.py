"""The setting ``tokenizer``: rows of embeddings and heads of all models in the order of the output's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from modelfuse.checkpoints import Checkpoint, StoredTensor, read_json
from modelfuse.checkpoints.side_files import encoded_json
from modelfuse.checkpoints.vocabulary.rearranged_rows import rearranged
from modelfuse.checkpoints.vocabulary.row_maps import RowMap, Vocabularies
from modelfuse.checkpoints.vocabulary.token_rows import axis_of_tokens, limit_of, rows_of
from modelfuse.checkpoints.vocabulary.tokenizers import TOKENIZER_CONFIG, TOKENIZER_FILE, read_tokenizer
from modelfuse.checkpoints.vocabulary.union import OutputVocabulary, one_of, union_of
from modelfuse.errors import MismatchError
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import folder_of, is_file


class WithVocabulary(NamedTuple):
    """The models with one vocabulary.

    Attributes:
        models: The models with their rows in the output's order.
        originals: The models as they are, with the changes in config.json.
        made_files: Names and contents of the tokenizer files that are not copied from an input.
        notes: Notes for the user.
    """

    models: tuple[Checkpoint, ...]
    originals: tuple[Checkpoint, ...]
    made_files: Mapping[str, bytes]
    notes: tuple[str, ...]


def rearranged_models(recipe: Recipe, models: Sequence[Checkpoint]) -> WithVocabulary:
    """Give all models the vocabulary that the recipe's ``tokenizer`` names. Padding rows are kept.

    Raises:
        CheckpointError: If a model's tokenizer is missing or cannot be read.
        MismatchError: If the rows of the models differ in length.
    """
    tokenizers = [read_tokenizer(folder_of(model.path)) for model in models]
    limits = [limit_of(model) for model in models]
    first = recipe.reference % len(models)
    output = _output(recipe, tokenizers, limits, first)
    length = max(output.rows, rows_of(models[_owner(recipe, first)]) or 0)
    vocabularies = Vocabularies(output.tokens, tokenizers, limits, first if recipe.has_base else None, {}, length)
    maps = vocabularies.row_maps(range(len(models)))
    changed = [replace(model, tensors=_tensors(number, models, maps[number])) for number, model in enumerate(models)]
    originals = [*models]
    originals[first] = replace(models[first], config_changes={**models[first].config_changes, "vocab_size": length})
    note = f"The vocabulary has {len(output.tokens):,} tokens, {len(output.added):,} of them new, in {length:,} rows."
    return WithVocabulary(tuple(changed), tuple(originals), _tokenizer_files(output), (note,))


def _output(recipe: Recipe, tokenizers: Sequence[object], limits: Sequence[int], first: int) -> OutputVocabulary:
    if recipe.tokenizer == "union":
        order = [first, *(number for number in range(len(tokenizers)) if number != first)]
        return union_of([tokenizers[each] for each in order], [limits[each] for each in order])  # type: ignore[misc]
    owner = _owner(recipe, first)
    return one_of(tokenizers[owner], limit=limits[owner] if owner == first else None)  # type: ignore[arg-type]


def _owner(recipe: Recipe, first: int) -> int:
    """The index of the input whose tokenizer files the output gets."""
    return first if recipe.tokenizer_from is None else recipe.inputs.index(recipe.tokenizer_from)


def _tensors(number: int, models: Sequence[Checkpoint], row_map: RowMap) -> dict[str, StoredTensor]:
    rows = [rows_of(model) for model in models]
    changed = {}
    for name, tensor in models[number].tensors.items():
        axis = axis_of_tokens(name, tensor, rows[number])
        if axis is not None:
            donors = {each: models[each].find(name) for each in row_map.donors}
            found = {each: donor for each, donor in donors.items() if donor is not None and not donor.is_delta}
            chosen = row_map.of_difference(number) if tensor.is_delta else row_map
            missing = [models[each].path for each in chosen.donors if each not in {**found, number: tensor}]
            widths = {each.shape[1 - axis : 2 - axis] for each in (tensor, *found.values())}
            if missing or len(widths) > 1:
                raise MismatchError(
                    f"The rows of {name} cannot be rearranged: "
                    + (f"{missing[0]} does not have it" if missing else "their lengths differ between the models"),
                    "Merge models of the same width that have the same tensors.",
                )
            tensor = rearranged(number, {**found, number: tensor}, chosen, axis)
        changed[name] = tensor
    return changed


def _tokenizer_files(output: OutputVocabulary) -> dict[str, bytes]:
    if not output.is_changed:
        return {}
    made = {TOKENIZER_FILE: output.tokenizer_json()}
    config = output.tokenizer.folder / TOKENIZER_CONFIG
    if is_file(config):
        made[TOKENIZER_CONFIG] = encoded_json(output.tokenizer_config(read_json(config)))
    return made
