"""The words of the command line as settings."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import NoReturn

from modelfuse.errors import RecipeError
from modelfuse.recipe.files import load_recipe
from modelfuse.recipe.recipe import ANOTHER_WAY, SETTINGS, by_canonical_name, canonical_name

#: More than any float has before or behind its point.
MOST_DIGITS = 400


class Parser(argparse.ArgumentParser):
    """Refuses words as a recipe is refused."""

    command = "merge"

    def error(self, message: str) -> NoReturn:
        raise RecipeError(message[0].upper() + message[1:], f"`modelfuse {self.command} --help` lists every setting.")


class VerifyParser(Parser):
    """The same for ``modelfuse verify``."""

    command = "verify"


def parse(words: Sequence[str]) -> tuple[dict[str, object], bool]:
    """Turn words into named settings: those of a recipe file, overridden by flags.

    Returns:
        The settings, and whether to be quiet.

    Raises:
        RecipeError: If a flag is unknown or lacks its value, or the recipe cannot be read.
    """
    parser = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("recipe", nargs="?", type=Path, default=None)
    parser.add_argument("--quiet", action="store_true")
    for name in ANOTHER_WAY:
        parser.add_argument(f"--{name}")
    for name, setting in SETTINGS.items():
        if setting.is_switch:
            parser.add_argument(f"--{name}", nargs="?", const=True)
        elif setting.takes_several:
            parser.add_argument(f"--{name}", nargs="+")
        else:
            parser.add_argument(f"--{name}")
    given = vars(parser.parse_args(_switched([part for word in words for part in _normal(word)])))
    quiet = bool(given.pop("quiet", False))
    path = given.pop("recipe", None)
    settings = by_canonical_name(load_recipe(path)) if path else {}
    ways = ("model_path_list", *ANOTHER_WAY)
    if any(name in given for name in ways):
        settings = {name: value for name, value in settings.items() if name not in ways}
    return {**settings, **given}, quiet


def _normal(word: str) -> list[str]:
    """A flag with its name as the recipe has it; a negative number as argparse knows it."""
    if word.startswith("--") and len(word) > 2:
        name, equals, value = word[2:].partition("=")
        plain = name.replace("-", "_")
        switched = plain.removeprefix("no_")
        if plain != switched and _is_switch(switched) and not equals:
            return [f"--{switched}", "False"]
        known = plain if plain == "quiet" else canonical_name(name)
        return [f"--{known}", value] if equals else [f"--{known}"]
    if word.startswith("-") and len(word) > 1:
        try:
            number = Decimal(word)
        except InvalidOperation:
            raise RecipeError(f"There is no flag {word}", "Flags begin with two dashes.") from None
        if not number.is_finite() or abs(number.adjusted()) > MOST_DIGITS:
            raise RecipeError(f"{word} is not a number that any setting takes")
        return [format(number, "f")]
    return [word]


def _switched(words: Sequence[str]) -> list[str]:
    """A recipe behind a boolean flag is no value of it: the flag gets its own."""
    done: list[str] = []
    for word in words:
        flag = done[-1].removeprefix("--") if done and done[-1].startswith("--") else ""
        if _is_switch(flag) and _is_recipe(word):
            done.append("True")
        done.append(word)
    return done


def _is_recipe(word: str) -> bool:
    return word.endswith((".json", ".yaml", ".yml")) or os.path.isfile(word)


def _is_switch(name: str) -> bool:
    return name in SETTINGS and SETTINGS[name].is_switch
