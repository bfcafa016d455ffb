"""Recipes kept in files."""

from __future__ import annotations

import json
from pathlib import Path

from modelfuse.errors import RecipeError


def load_recipe(path: Path) -> dict[str, object]:
    """Read the settings in a .json or .yaml recipe; ``Recipe.parse`` checks them.

    Raises:
        RecipeError: If the file cannot be read or is not a map of settings.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        content = json.loads(text) if path.suffix == ".json" else _load_yaml(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"The recipe {path} is malformed: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RecipeError(f"The recipe {path} is not a map of settings to values")
    return content


def _load_yaml(text: str) -> object:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
