"""All settings by name, with their aliases and alternatives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from modelfuse.errors import RecipeError
from modelfuse.recipe.adapter_base import base_of
from modelfuse.recipe.checks import nearest
from modelfuse.recipe.files import RECORD
from modelfuse.recipe.installed_methods import register_installed
from modelfuse.recipe.method_settings import METHOD_SETTINGS, METHOD_SYNONYMS, STEPS, take_up
from modelfuse.recipe.schema import Setting, settings_of
from modelfuse.recipe.settings import Settings

#: Keys of merge_config.json that are not settings; accepted in recipes.
INFORMATION = (RECORD,)
#: Alternatives to model_path_list: a comma-separated string, and a single adapter.
ANOTHER_WAY = ("model_path_str", "lora_model_path")
#: Aliases of settings.
SYNONYMS = {"model_prefix": "merge_prefix", **METHOD_SYNONYMS}


def _settings() -> dict[str, Setting]:
    """All settings by name, in order, including those of methods."""
    found = settings_of(Settings)
    before = list(found)[: list(found).index("rules")]
    return {**{name: found[name] for name in before}, **METHOD_SETTINGS, **found}


SETTINGS = _settings()


def _look_further(unknown: Iterable[bool]) -> None:
    """Register methods of installed packages, if any name is unknown."""
    if any(unknown) and register_installed():
        renew()


def renew() -> None:
    """Update the settings after methods were registered."""
    take_up()
    SETTINGS.update(_settings())
    SYNONYMS.update(METHOD_SYNONYMS)


def canonical_name(name: str) -> str:
    """A setting's name with dashes made underscores and synonyms resolved.

    Raises:
        RecipeError: If there is no such setting; suggests the closest.
    """
    plain = name.replace("-", "_")
    plain = SYNONYMS.get(plain, plain)
    _look_further([plain not in (*SETTINGS, *INFORMATION, *ANOTHER_WAY)])
    if (plain := SYNONYMS.get(plain, plain)) not in (*SETTINGS, *INFORMATION, *ANOTHER_WAY):
        raise RecipeError(f"There is no setting {name!r}", nearest(plain, (*SETTINGS, *ANOTHER_WAY)))
    return plain


def by_canonical_name(settings: Mapping[str, object]) -> dict[str, object]:
    """The same settings by their :func:`canonical_name`.

    Raises:
        RecipeError: If there is no such setting, or one is given under two names.
    """
    named: dict[str, object] = {}
    for name, value in settings.items():
        plain = canonical_name(name)
        if plain in named:
            raise RecipeError(f"The setting {plain} is given twice")
        named[plain] = value
    return named


def canonical(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings under their canonical names, with alternatives to model_path_list resolved.

    Raises:
        RecipeError: If there is no such setting, or models are given in two ways.
    """
    words = {name: settings.get(name) for name in STEPS}
    _look_further(isinstance(each, str) and each not in SETTINGS[name].choices for name, each in words.items())
    named = {name: value for name, value in by_canonical_name(settings).items() if name not in INFORMATION}
    if isinstance(named.get("missing"), str):
        named["missing"] = [named["missing"]]
    joined = named.pop("model_path_str", None)
    if joined is not None:
        if named.get("model_path_list"):
            raise RecipeError("model_path_str and model_path_list are both given", "Give one of them.")
        if not isinstance(joined, str):
            raise RecipeError("model_path_str is not a comma-separated string")
        named["model_path_list"] = [part for part in (part.strip() for part in joined.split(",")) if part]
    adapter = named.pop("lora_model_path", None)
    if adapter is not None:
        if named.get("model_path_list"):
            raise RecipeError(
                "lora_model_path and models are both given", "Name adapters in model_path_list, beside other models."
            )
        if named.get("base_model_path") is None:
            named["base_model_path"] = base_of(adapter)
        named["model_path_list"] = [adapter]
    text = named.get("mergekit")
    if isinstance(text, str) and not named.get("model_path_list"):
        from modelfuse.recipe.arcee.documents import read_configurations

        named["model_path_list"] = list(read_configurations(text).models.values())
    for name in ("model_path_list", "weight_list", "rules", "copy_file_list"):
        if named.get(name) is None:
            named.pop(name, None)
    return named
