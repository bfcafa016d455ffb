"""References to models: a path or a hub name, optionally with a revision and an adapter."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from modelfuse.errors import RecipeError
from modelfuse.recipe.arcee.notes import Notes
from modelfuse.recipe.checks import is_path, shown
from modelfuse.recipe.hub_names import HUB_SCHEME, HubName, hub_name
from modelfuse.storage import PathOrUrl, path_or_url

MODEL_KEYS = ("model", "lora", "override_architecture")
PATH_KEYS = ("path", "revision")
HINT = "Write a path, org/model, org/model@revision, or model+adapter."


@dataclass(frozen=True, slots=True)
class Stage:
    """The result of another document of the same file.

    Attributes:
        name: The document's name.
    """

    name: str

    def __str__(self) -> str:
        return self.name


#: A model's weights: a path, a hub name, or the result of a document.
Weights = PathOrUrl | HubName | Stage


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference to a model. Two are equal if they mean the same weights, however they are written.

    Attributes:
        model: The model.
        lora: An adapter to apply to it.
        words: The text in the configuration.
    """

    model: Weights
    lora: Weights | None = None
    words: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return "+".join(self.words)

    @property
    def parts(self) -> tuple[Weights, ...]:
        """The model, and the adapter if there is one."""
        return (self.model,) if self.lora is None else (self.model, self.lora)


@dataclass(slots=True)
class References:
    """Reads references to models.

    Attributes:
        stages: The names of the file's documents.
        known: Known meanings of words; other words are looked up.
        found: The meaning of each word, in order of occurrence.
    """

    stages: Collection[str] = ()
    known: Mapping[str, Weights] = field(default_factory=dict)
    found: dict[str, Weights] = field(default_factory=dict)

    def read(self, value: object, where: str, notes: Notes) -> Reference:
        """Read a reference to a model.

        >>> str(References().read("org/model@main+org/adapter", "base_model", Notes()).lora)
        'org/adapter'

        Args:
            value: Text, or mergekit's map for it.
            where: Its path in the configuration, for errors.
            notes: Receives notes on what has no effect.

        Raises:
            RecipeError: If it names no model.
        """
        if isinstance(value, Mapping):
            return self._from_map(value, where, notes)
        if not isinstance(value, str) or not is_path(value.strip()):
            raise RecipeError(f"{where} is {shown(value)}, which names no model", HINT)
        text = value.strip()
        if text in self.stages or text in self.known or _is_url(text) or os.path.lexists(text):
            return Reference(self._weights(text, None, text, where, notes), None, (text,))
        model, plus, lora = text.partition("+")
        if "+" in lora or not model or (plus and not lora):
            raise RecipeError(f"{where} is {text!r}: there is one + at most, between a model and an adapter", HINT)
        words = (model, lora) if plus else (model,)
        parts = [self._from_word(word, where, notes) for word in words]
        return Reference(parts[0], parts[1] if plus else None, words)

    def _from_word(self, word: str, where: str, notes: Notes) -> Weights:
        """A model from ``path`` or ``path@revision``."""
        if word in self.known or os.path.lexists(word):
            return self._weights(word, None, word, where, notes)
        path, at, revision = word.partition("@")
        if "@" in revision or not path or (at and not revision):
            raise RecipeError(f"{where} is {word!r}: there is one @ at most, between a name and a revision", HINT)
        return self._weights(path, revision or None, word, where, notes)

    def _from_map(self, value: Mapping[object, object], where: str, notes: Notes) -> Reference:
        notes.unknown(value, MODEL_KEYS, where)
        if value.get("override_architecture") is not None:
            notes.add(f"override_architecture of {where} has no effect: tensors are found by their names")
        found = list[Weights]()
        words = list[str]()
        for key in ("model", "lora"):
            part = value.get(key)
            if part is None and key == "lora":
                continue
            if isinstance(part, str):
                part = {"path": part}
            if not isinstance(part, Mapping) or not isinstance(part.get("path"), str):
                raise RecipeError(f"{where}.{key} names no model", "Write path: PATH below it, and perhaps revision.")
            notes.unknown(part, PATH_KEYS, f"{where}.{key}")
            revision = part.get("revision")
            if revision is not None and not isinstance(revision, str):
                raise RecipeError(f"{where}.{key}.revision is {shown(revision)}, which is no text")
            words.append(part["path"] if revision is None else f"{part['path']}@{revision}")
            found.append(self._weights(part["path"], revision, words[-1], f"{where}.{key}", notes))
        return Reference(found[0], found[1] if len(found) > 1 else None, tuple(words))

    def _weights(self, path: str, revision: str | None, word: str, where: str, notes: Notes) -> Weights:
        """The meaning of a word, which is recorded."""
        if path in self.stages and revision is None:
            return Stage(path)
        found = self.known.get(word)
        if found is None:
            found = _look_for(path, revision, where, notes)
        self.found.setdefault(word, found)
        return found


def _is_url(text: str) -> bool:
    return "://" in text and not text.startswith(HUB_SCHEME)


def _look_for(path: str, revision: str | None, where: str, notes: Notes) -> Weights:
    if not is_path(path):
        raise RecipeError(f"{where} is {shown(path)}, which names no model", HINT)
    if not _is_url(path) and not os.path.lexists(path):
        named = hub_name(path if revision is None else f"{path}@{revision}")
        if named is not None:
            return named
        if revision is not None and hub_name(path) is not None:
            raise RecipeError(f"{where}: {revision!r} is no name of a revision", HINT)
    if revision is not None:
        notes.add(f"The revision {revision!r} of {where} has no effect: {path} is no hub name")
    try:
        return path_or_url(path)
    except ValueError as error:
        raise RecipeError(f"{where} is {path!r}: {error}", HINT) from None
