"""What configurations call models by: a path or a hub name, perhaps with a revision, and an adapter on top."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from modelfuse.errors import RecipeError
from modelfuse.recipe.arcee.notes import Notes
from modelfuse.recipe.checks import is_path, shown
from modelfuse.recipe.hub_names import HubName, hub_name
from modelfuse.storage import Place, place_of

MODEL_KEYS = ("model", "lora", "override_architecture")
PATH_KEYS = ("path", "revision")
HINT = "Write a path, org/model, org/model@revision, or model+adapter."


@dataclass(frozen=True, slots=True)
class Stage:
    """The result of another document of the same file.

    Attributes:
        name: Its name there.
    """

    name: str

    def __str__(self) -> str:
        return self.name


#: A model's weights: where they are, what they are called on a hub, or which document makes them.
Weights = Place | HubName | Stage


@dataclass(frozen=True, slots=True)
class Reference:
    """A model of a configuration. Two are equal if they mean the same weights, however they were written.

    Attributes:
        model: The model.
        lora: An adapter to be applied to it.
        text: How the configuration names it.
    """

    model: Weights
    lora: Weights | None = None
    text: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.text

    @property
    def parts(self) -> tuple[Weights, ...]:
        """The model, and the adapter if there is one."""
        return (self.model,) if self.lora is None else (self.model, self.lora)


def read_reference(value: object, where: str, stages: Collection[str], notes: Notes) -> Reference:
    """Read what names a model.

    >>> str(read_reference("org/model@main+org/adapter", "base_model", (), Notes()).lora)
    'org/adapter'

    Args:
        value: Text, or the map that mergekit writes it out as.
        where: Its place in the configuration, for errors.
        stages: The names of the file's documents.
        notes: Takes what has no effect.

    Raises:
        RecipeError: If it names no model.
    """
    if isinstance(value, Mapping):
        return _from_map(value, where, stages, notes)
    if not isinstance(value, str) or not is_path(value.strip()):
        raise RecipeError(f"{where} is {shown(value)}, which names no model", HINT)
    text = value.strip()
    if text in stages or "://" in text or os.path.lexists(text):
        return Reference(_weights(text, None, where, stages, notes), None, text)
    model, plus, lora = text.partition("+")
    if "+" in lora or not model or (plus and not lora):
        raise RecipeError(f"{where} is {text!r}: there is one + at most, between a model and an adapter", HINT)
    parts = [_from_word(word, where, stages, notes) for word in ((model, lora) if plus else (model,))]
    return Reference(parts[0], parts[1] if plus else None, text)


def _from_word(word: str, where: str, stages: Collection[str], notes: Notes) -> Weights:
    """A model from ``path`` or ``path@revision``."""
    if os.path.lexists(word):
        return _weights(word, None, where, stages, notes)
    path, at, revision = word.partition("@")
    if "@" in revision or not path or (at and not revision):
        raise RecipeError(f"{where} is {word!r}: there is one @ at most, between a name and a revision", HINT)
    return _weights(path, revision or None, where, stages, notes)


def _from_map(value: Mapping[object, object], where: str, stages: Collection[str], notes: Notes) -> Reference:
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
        found.append(_weights(part["path"], revision, f"{where}.{key}", stages, notes))
        words.append(part["path"] if revision is None else f"{part['path']}@{revision}")
    return Reference(found[0], found[1] if len(found) > 1 else None, "+".join(words))


def _weights(path: str, revision: str | None, where: str, stages: Collection[str], notes: Notes) -> Weights:
    if not is_path(path):
        raise RecipeError(f"{where} is {shown(path)}, which names no model", HINT)
    if path in stages and revision is None:
        return Stage(path)
    if "://" not in path and not os.path.lexists(path):
        named = hub_name(path if revision is None else f"{path}@{revision}")
        if named is not None:
            return named
        if revision is not None and hub_name(path) is not None:
            raise RecipeError(f"{where}: {revision!r} is no name of a revision", HINT)
    if revision is not None:
        notes.add(f"The revision {revision!r} of {where} has no effect: {path} is no hub name")
    try:
        return place_of(path)
    except ValueError as error:
        raise RecipeError(f"{where} is {path!r}: {error}", HINT) from None
