"""The output's model card: a README.md with the inputs, the settings, and front matter for the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct

from modelfuse.checkpoints import CONFIG_FILE, Checkpoint, read_json
from modelfuse.errors import ModelfuseError
from modelfuse.printable import one_line
from modelfuse.recipe.files import load_documents
from modelfuse.recipe.hub_names import HubName
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import PathOrUrl, Url, folder_of, has_file, size_of
from modelfuse.storage.files import read_whole
from modelfuse.version import __version__

CARD_FILE = "README.md"
#: Larger cards are not read, in bytes.
LARGEST = 1_000_000
#: The most models that the title names.
MOST_NAMED = 4
#: Text that needs no quotes in YAML.
_PLAIN = re.compile(r"(?!(?:true|false|yes|no|on|off|null|nan|inf)$)[A-Za-z][\w./@-]*", re.IGNORECASE | re.ASCII)
_WORD = re.compile(r"[\w][\w .+-]{0,99}", re.ASCII)
#: The hub's value for licences that are not in its list.
OTHER = "other"
#: Settings that do not change the output's content.
_MACHINE = ("output_path", "n_process", "memory", "device", "tensor_type", "gpu_memory", "allow_cpu_fallback", "engine",
            "ray_address", "ray_timeout", "overwrite", "hub_endpoint", "split_pieces", "max_tensor_mem", "model_card",
            "copy_file_list", "allow_mismatch")  # fmt: skip


class CardFacts(Struct, frozen=True):
    """The front matter of an input's model card.

    Attributes:
        licence: The licence, if it is given.
        languages: The languages of its texts.
    """

    licence: str | None
    languages: tuple[str, ...]


def model_card(recipe: Recipe, models: Sequence[Checkpoint], base: int | None) -> bytes:
    """The content of README.md, UTF-8.

    Args:
        recipe: The settings.
        models: The inputs in the recipe's order.
        base: The index of the base among them, if there is one.
    """
    facts = [card_facts(folder_of(model.path)) for model in models]
    front, configuration = as_yaml(_front(recipe, models, facts)), _configuration(recipe).rstrip()
    fence = "```" if "```" not in configuration else "~~~~~"
    names = [_short(each) for each in recipe.inputs]
    title = ", ".join(names[:MOST_NAMED]) + (" and more" if len(names) > MOST_NAMED else "")
    lines = [
        "---", front.rstrip(), "---", "", f"# A merge of {title}", "",
        f"This model was merged with modelfuse {__version__}, method **{_method(recipe)}**.", "", "## Models", "",
        *_models(recipe, base, facts), "", "## Configuration", "", f"{fence}yaml", configuration, fence, "",
    ]  # fmt: skip
    return "\n".join(lines).encode(errors="backslashreplace")


def as_yaml(content: Mapping[str, object]) -> str:
    """Readable YAML of a flat mapping of values and lists of values.

    >>> print(as_yaml({"language": ["en", "no"], "weight_list": [1.0, 0.5]}))
    language:
    - en
    - "no"
    weight_list:
    - 1.0
    - 0.5
    """
    lines = []
    for key, value in content.items():
        if isinstance(value, list | tuple) and value:
            lines += [f"{key}:", *(f"- {_scalar(each)}" for each in value)]
        else:
            lines.append(f"{key}: {_scalar(value)}")
    return "\n".join(lines)


def _scalar(value: object) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False)  # JSON is valid YAML.


def card_facts(folder: PathOrUrl) -> CardFacts:
    """Read the front matter of a model's card; empty facts if there is none or it cannot be read."""
    path = folder / CARD_FILE
    try:
        if isinstance(folder, Url) or not has_file(path) or size_of(path) > LARGEST:
            return CardFacts(None, ())
        text = read_whole(path).decode("utf-8", "replace").lstrip("\ufeff")
        if not text.startswith("---\n"):
            return CardFacts(None, ())
        said = load_documents(text[4:].partition("\n---")[0])
    except ModelfuseError:
        return CardFacts(None, ())
    found = said[0] if said and isinstance(said[0], Mapping) else {}
    licence, languages = found.get("license"), found.get("language")
    if licence == OTHER and isinstance(found.get("license_name"), str):
        licence = found["license_name"]
    spoken = [languages] if isinstance(languages, str) else languages if isinstance(languages, list) else []
    return CardFacts(licence if _is_word(licence) else None, tuple(each for each in spoken if _is_word(each)))


def _is_word(value: object) -> bool:
    """Whether a value from a model card is a short plain text, as licences and languages are."""
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def _front(recipe: Recipe, models: Sequence[Checkpoint], facts: Sequence[CardFacts]) -> dict[str, object]:
    """The front matter. Only inputs with a hub name are listed as base models."""
    named = list(dict.fromkeys(each.name for each in recipe.inputs if isinstance(each, HubName)))
    licences = list(dict.fromkeys(each.licence for each in facts if each.licence is not None))
    languages = list(dict.fromkeys(language for each in facts for language in each.languages))
    front: dict[str, object] = {"base_model": named, "base_model_relation": "merge"} if named else {}
    if len(licences) == 1:
        front["license"] = licences[0]
    elif licences:
        front |= {"license": OTHER, "license_name": " and ".join(licences)}
    if languages:
        front["language"] = languages
    if (library := _library(models)) is not None:
        front["library_name"] = library
    return front | {"tags": ["merge", "modelfuse"]}


def _library(models: Sequence[Checkpoint]) -> str | None:
    folder = folder_of(models[0].path)
    if has_file(folder / "modules.json"):
        return "sentence-transformers"
    config = read_json(folder / CONFIG_FILE) if has_file(folder / CONFIG_FILE) else {}
    return "diffusers" if "_class_name" in config else "transformers" if config else None


def _method(recipe: Recipe) -> str:
    return recipe.method_told[0] if recipe.mergekit is not None else recipe.parameters.name


def _models(recipe: Recipe, base: int | None, facts: Sequence[CardFacts]) -> Iterator[str]:
    for number, each in enumerate(recipe.inputs):
        name = (
            f"[{each.name}](https://huggingface.co/{each.name})" if isinstance(each, HubName) else f"`{_short(each)}`"
        )
        commit = f" at `{each.revision}`" if isinstance(each, HubName) and each.revision else ""
        licence = f", licence {facts[number].licence}" if facts[number].licence else ""
        yield f"- {name}{commit}{' (base)' if number == base else ''}{licence}"


def _configuration(recipe: Recipe) -> str:
    """The mergekit configuration as given, or the settings with the names of local folders instead of their paths."""
    if recipe.mergekit is not None:
        return recipe.mergekit
    settings = {name: value for name, value in recipe.effective().items()
                if name not in _MACHINE and value not in (None, [], False)}  # fmt: skip
    settings["model_path_list"] = [_short(each) for each in recipe.model_path_list]
    for name in ("base_model_path", "tokenizer_from", "unmerged_from"):
        if settings.get(name) is not None:
            settings[name] = _short(getattr(recipe, name))
    return as_yaml(settings)


def _short(each: PathOrUrl | HubName) -> str:
    return str(each) if isinstance(each, HubName) else one_line(each.name).replace("`", "'")
