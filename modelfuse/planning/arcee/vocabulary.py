"""The output's vocabulary by the configuration's tokenizer settings, and its rows of embeddings and heads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.vocabulary.rearranged_rows import rearranged
from modelfuse.checkpoints.vocabulary.row_maps import RowMap, TokenRow, Vocabularies
from modelfuse.checkpoints.vocabulary.token_rows import axis_of_tokens, has_rows_of_tokens, limit_of, rows_of
from modelfuse.checkpoints.vocabulary.tokenizers import TOKENIZER_FILE, Tokenizer, read_tokenizer, tokenizer_of
from modelfuse.checkpoints.vocabulary.union import OutputVocabulary, one_of, union_of
from modelfuse.errors import MismatchError, RecipeError
from modelfuse.planning.arcee.models import OpenModel
from modelfuse.planning.arcee.tensors import Slot
from modelfuse.recipe.arcee.configuration import TokenizerSettings, TokenSource
from modelfuse.recipe.arcee.references import Reference


@dataclass
class Vocabulary:
    """The output's vocabulary.

    Attributes:
        output: Its tokens and tokenizer.
        models: The models, in the order of ``vocabularies``.
        vocabularies: The models' vocabularies, from which row maps are made.
        notes: Notes for the user.
    """

    output: OutputVocabulary
    models: Sequence[OpenModel]
    vocabularies: Vocabularies
    notes: list[str] = field(default_factory=list)
    _maps: dict[tuple[int, ...], dict[int, RowMap]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """The number of rows of embeddings and heads."""
        return self.vocabularies.length + self.vocabularies.padding

    @property
    def owner(self) -> OpenModel:
        """The model whose tokenizer files the output gets."""
        tokenizers = self.vocabularies.tokenizers
        return next(model for model, each in zip(self.models, tokenizers, strict=True) if each is self.output.tokenizer)

    def rearranged(self, slot: Slot, tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
        """The tensors of a slot, with rows in the output's order if they have one row per token."""
        numbers = [self._number(source.model) for source in slot.sources]
        axes = [self._axis(number, slot.name, tensor) for number, tensor in zip(numbers, tensors, strict=True)]
        if any(axis is None for axis in axes):
            return list(tensors)
        maps = self._maps_of(tuple(numbers))
        own = dict(zip(numbers, tensors, strict=True))
        found = []
        for number, axis in zip(numbers, axes, strict=True):
            row_map = maps[number]
            donors = {each: own[each] if each in own else self._of_other(each, slot) for each in row_map.donors}
            _check_widths(slot.name, [own[number], *donors.values()], axis or 0)
            found.append(rearranged(number, {**donors, number: own[number]}, row_map, axis or 0))
        return found

    def _number(self, reference: Reference) -> int:
        return next(number for number, model in enumerate(self.models) if model.reference == reference)

    def _axis(self, number: int, name: str, tensor: StoredTensor) -> int | None:
        """The axis along which a tensor has one row per token; None if it has none."""
        return axis_of_tokens(name, tensor, rows_of(self.models[number].checkpoint))

    def _maps_of(self, present: tuple[int, ...]) -> dict[int, RowMap]:
        if present not in self._maps:
            self._maps[present] = self.vocabularies.row_maps(present)
            if missing := self.vocabularies.missing(present):
                shown = ", ".join(map(repr, missing[:5])) + (f" and {len(missing) - 5} more" if missing[5:] else "")
                self.notes.append(f"The rows of these tokens, which no model has, are zeros: {shown}.")
        return self._maps[present]

    def _of_other(self, number: int, slot: Slot) -> StoredTensor:
        """The tensor of a model that is not a source of the slot, but provides rows of tokens."""
        found = self.models[number].find(slot.name)
        if found is None:
            raise MismatchError(f"{self.models[number].reference} has no {slot.name}, but rows of tokens come from it")
        return found


def truncated(name: str, tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """Cut embeddings and heads to the smallest number of rows; other tensors are returned as they are."""
    shapes = {tensor.shape for tensor in tensors}
    if not has_rows_of_tokens(name) or len(shapes) == 1 or len({shape[1:] for shape in shapes}) > 1:
        return list(tensors)
    rows = min(shape[0] for shape in shapes)
    first = RowMap(np.zeros(rows, np.int64), np.arange(rows))
    return [rearranged(0, {0: tensor}, first) for tensor in tensors]


def open_vocabulary(
    settings: TokenizerSettings | None, models: Mapping[Reference, OpenModel], base: Reference | None
) -> Vocabulary | None:
    """Read the models' tokenizers and make the output's vocabulary.

    Args:
        settings: The configuration's tokenizer settings, if given.
        models: The models.
        base: The base, if there is one.

    Returns:
        The vocabulary; None without settings.

    Raises:
        CheckpointError: If a tokenizer is missing or malformed.
        RecipeError: If a source of a token does not have it.
    """
    if settings is None:
        return None
    opened = list(models.values())
    tokenizers = [_tokenizer_of(model) for model in opened]
    limits = [limit_of(model.checkpoint) for model in opened]
    number = 0 if base is None else list(models).index(base)
    extra = list(settings.tokens)
    if settings.source == "union":
        order = [number, *(each for each in range(len(opened)) if each != number)]
        output = union_of([tokenizers[each] for each in order], [limits[each] for each in order], extra)
    elif settings.source == "base":
        output = one_of(tokenizers[number], extra, limits[number])
    else:
        assert isinstance(settings.source, Reference)
        output = one_of(tokenizers[list(models).index(settings.source)], extra)
    wanted = {token: _row(token, source, models, tokenizers, limits)
              for token, source in settings.tokens.items() if source is not None}  # fmt: skip
    length = output.rows
    padding = -length % settings.pad_to_multiple_of if settings.pad_to_multiple_of else 0
    vocabularies = Vocabularies(
        output.tokens, tokenizers, limits, None if base is None else number, wanted, length, padding
    )
    return Vocabulary(output, opened, vocabularies)


def _tokenizer_of(model: OpenModel) -> Tokenizer:
    made, folder = model.made.get(TOKENIZER_FILE), model.folder
    return read_tokenizer(folder) if made is None else tokenizer_of(json.loads(made), folder / TOKENIZER_FILE)


def _row(
    token: str,
    source: TokenSource,
    models: Mapping[Reference, OpenModel],
    tokenizers: Sequence[Tokenizer],
    limits: Sequence[int],
) -> TokenRow:
    if source.kind == "zero" or source.model is None:
        return TokenRow(None, source.force)
    number = list(models).index(source.model)
    word = token if source.token is None else source.token
    row = source.token_id if source.token_id is not None else tokenizers[number].tokens.get(word)
    if row is None or row >= limits[number]:
        what = f"row {source.token_id}" if source.token_id is not None else f"token {word!r}"
        raise RecipeError(
            f"tokenizer.tokens: the source of {token!r} is {source.model}, which has no {what}",
            "Give another source, or kind: zero.",
        )
    return TokenRow((number, row), source.force)


def _check_widths(name: str, tensors: Sequence[StoredTensor], axis: int) -> None:
    widths = {tensor.shape[:axis] + tensor.shape[axis + 1 :] for tensor in tensors}
    if len(widths) > 1:
        raise MismatchError(
            f"The rows of {name} differ in length: " + ", ".join(str(list(each.shape)) for each in tensors),
            "Merge models of the same width.",
        )
