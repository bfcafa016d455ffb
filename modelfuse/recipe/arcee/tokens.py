"""Parse the tokenizer settings of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from modelfuse.errors import RecipeError
from modelfuse.recipe.arcee.configuration import TokenizerSettings, TokenSource
from modelfuse.recipe.arcee.notes import Notes
from modelfuse.recipe.arcee.parameters import scalar
from modelfuse.recipe.arcee.references import Reference
from modelfuse.recipe.checks import shown

TOKENIZER_KEYS = ("source", "tokens", "pad_to_multiple_of")
TOKEN_KEYS, SOURCE_KEYS = ("source", "force"), ("kind", "model", "token", "token_id")
#: Sources other than models.
WORDS = ("union", "base")
MOST_MULTIPLE = 1 << 20

ReadModel = Callable[[object, str], Reference]


def read_tokenizer(content: Mapping[object, object], model: ReadModel, notes: Notes) -> TokenizerSettings | None:
    """Read ``tokenizer_source`` or ``tokenizer``.

    Raises:
        RecipeError: If both are given, or anything in them is invalid.
    """
    old, given = content.get("tokenizer_source"), content.get("tokenizer")
    if old is not None and given is not None:
        raise RecipeError("tokenizer_source and tokenizer are both given", "Give tokenizer: alone.")
    if old is not None:
        return TokenizerSettings(_source(old, "tokenizer_source", model), {})
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise RecipeError(f"tokenizer is {shown(given)}", "Write source: union, base or a model below it.")
    notes.unknown(given, TOKENIZER_KEYS, "tokenizer")
    source, tokens = given.get("source"), given.get("tokens")
    if tokens is not None and not (isinstance(tokens, Mapping) and all(isinstance(each, str) for each in tokens)):
        raise RecipeError("tokenizer.tokens is no map of tokens", 'Write "<token>": and its source: below it.')
    return TokenizerSettings(
        "union" if source is None else _source(source, "tokenizer.source", model),
        {str(name): _token(each, f"tokenizer.tokens[{name!r}]", model, notes) for name, each in (tokens or {}).items()},
        _multiple(given.get("pad_to_multiple_of")),
    )


def _source(value: object, where: str, model: ReadModel) -> str | Reference:
    if isinstance(value, str) and value in WORDS:
        return value
    if isinstance(value, str) and value.startswith("model:"):
        raise RecipeError(f"{where} is {value!r}", f"Write {value.removeprefix('model:')}, without model: before it.")
    read = model(value, where)
    if read.lora is not None:
        raise RecipeError(f"{where} is {read}", "Name the model that has the tokenizer, without an adapter.")
    return read


def _multiple(value: object) -> int | None:
    if value is None:
        return None
    read = scalar(value, "count")
    if read is None or isinstance(value, bool) or not 1 <= read <= MOST_MULTIPLE:
        raise RecipeError(f"tokenizer.pad_to_multiple_of is {shown(value)}", "Give a whole number such as 64.")
    return int(read)


def _token(value: object, where: str, model: ReadModel, notes: Notes) -> TokenSource | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where} is {shown(value)}", "Write source: below it.")
    notes.unknown(value, TOKEN_KEYS, where)
    force = scalar(value.get("force", False), "switch")
    if force is None:
        raise RecipeError(f"{where}.force is {shown(value['force'])}, but true or false is needed")
    source = value.get("source")
    if source is None:
        if force:
            raise RecipeError(f"{where} is forced, but has no source", "Write source: MODEL below it.")
        return None
    if isinstance(source, Mapping) and "kind" in source:
        return _kind(source, bool(force), f"{where}.source", model, notes)
    return TokenSource("model", model(source, f"{where}.source"), force=bool(force))


def _kind(source: Mapping[object, object], force: bool, where: str, model: ReadModel, notes: Notes) -> TokenSource:
    kind = source["kind"]
    notes.unknown(source, SOURCE_KEYS, where)
    if kind == "zero":
        return TokenSource("zero", force=force)
    if kind != "model_token":
        raise RecipeError(f"{where}.kind is {shown(kind)}", "Give zero or model_token, or name a model as source.")
    if source.get("model") is None:
        raise RecipeError(f"{where} names no model", "Write model: NAME beside kind.")
    token, number = source.get("token"), source.get("token_id")
    if (token is None) == (number is None):
        raise RecipeError(f"{where} needs a token or a token_id", "Give exactly one of them.")
    if token is not None and not isinstance(token, str):
        raise RecipeError(f"{where}.token is {shown(token)}, which is no text", "Put it between quotation marks.")
    if number is not None and (type(number) is not int or number < 0):
        raise RecipeError(f"{where}.token_id is {shown(number)}, which is no number of a token")
    return TokenSource("model_token", model(source["model"], f"{where}.model"), token, number, force)
