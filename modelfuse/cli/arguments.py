"""The words of the command line as settings and options."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NoReturn

from modelfuse.cli.groups import PREFIX, from_environment
from modelfuse.errors import RecipeError
from modelfuse.recipe.checks import closest
from modelfuse.recipe.files import load_recipe
from modelfuse.recipe.hosts_in_files import without_hosts
from modelfuse.recipe.names import ANOTHER_WAY, SETTINGS, by_canonical_name, canonical_name
from modelfuse.recipe.schema import Setting

#: More than any float has before or behind its point.
MOST_DIGITS = 400
#: What every command takes beside its settings: the field of ``Options``, its flags, and what it does.
OPTIONS = {
    "quiet": (("--quiet", "-q"), "Say only what is wrong."),
    "verbose": (("--verbose", "-v"), "Say more, with times and levels."),
    "json": (("--json",), "Write one JSON document to standard output."),
    "log_file": (("--log_file",), "Append everything that is said, and more, to this file."),
}
SHORT = {flags[-1]: flags[0] for flags, _ in OPTIONS.values() if len(flags) > 1}
#: Settings whose values may be given in one word, with commas; numbers have none, and a path may have some.
NUMBER = r"[-+]?(\d|\.\d)"


@dataclass(frozen=True, slots=True)
class Options:
    """How a command is to speak.

    Attributes:
        quiet: Only of what is wrong.
        verbose: Of more, with times and levels.
        json: In one document on standard output; all else on standard error.
        log_file: Where to write it, too.
        html: Of a merge, where to write a page of what it kept.
    """

    quiet: bool = False
    verbose: bool = False
    json: bool = False
    log_file: Path | None = None
    html: Path | None = None


class Parser(argparse.ArgumentParser):
    """A parser of one command, with its options.

    Args:
        command: The command.
        takes: The settings that it takes beside them.
    """

    def __init__(self, command: str) -> None:
        super().__init__(f"modelfuse {command}", add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        for name, (flags, about) in OPTIONS.items():
            if name == "log_file":
                self.add_argument(*flags, type=Path, help=about)
            else:
                self.add_argument(*flags, action="store_true", help=about)

    def error(self, message: str) -> NoReturn:
        raise RecipeError(message[0].upper() + message[1:], f"`{self.prog} --help` lists every setting.")

    def options_of(self, given: dict[str, object]) -> Options:
        """Take the options out of what was given."""
        options: dict[str, Any] = {name: given.pop(name) for name in OPTIONS if name in given}
        if "log_file" not in options and (named := os.environ.get(f"{PREFIX}LOG_FILE")):
            options["log_file"] = Path(named)
        return Options(**options)


def merge_parser(command: str) -> Parser:
    """The parser of ``merge`` and ``check``: a recipe, and every setting as a flag."""
    parser = Parser(command)
    parser.add_argument("recipe", nargs="?", type=Path, default=None)
    if command == "merge":
        parser.add_argument("--html", type=Path)
    for name in ANOTHER_WAY:
        parser.add_argument(f"--{name}")
    for name, setting in SETTINGS.items():
        if setting.is_switch:
            parser.add_argument(f"--{name}", nargs="?", const=True)
        else:
            parser.add_argument(f"--{name}", nargs="+" if _takes_words(setting) else None)
    return parser


def parse(
    words: Sequence[str],
    command: str = "merge",
    defaults: Mapping[str, object] = {},
) -> tuple[dict[str, object], Options]:
    """Turn words into named settings: those of a recipe file, overridden by the environment's, overridden by flags.

    Args:
        words: The words behind the command.
        command: ``merge`` or ``check``.
        defaults: What settings are where neither says anything.

    Raises:
        RecipeError: If a flag is unknown or lacks its value, or the recipe cannot be read.
    """
    plain = _switched([part for word in words for part in _normal(word)])
    parser = merge_parser(command)  # Now that it is known whether any setting is of a method of another package.
    given = vars(parser.parse_args(plain))
    options = replace(parser.options_of(given), html=given.pop("html", None))
    for name in given.keys() & SETTINGS.keys():
        if _takes_words(SETTINGS[name]):
            given[name] = _listed(given[name], SETTINGS[name].is_number or bool(SETTINGS[name].choices))
            if SETTINGS[name].is_per_model and len(given[name]) == 1:
                given[name] = given[name][0]
    path = given.pop("recipe", None)
    own = {**from_environment(), **given}
    settings = by_canonical_name(load_recipe(path)) if path else {}
    settings = without_hosts(f"The recipe {path}", settings, own)
    ways = ("model_path_list", *ANOTHER_WAY)
    if any(name in given for name in ways):
        settings = {name: value for name, value in settings.items() if name not in ways}
    return {**defaults, **settings, **own}, options


def parse_push(words: Sequence[str]) -> tuple[dict[str, Any], Options]:
    """Turn the words behind ``push`` into its arguments.

    Raises:
        RecipeError: If a flag is unknown or lacks its value.
    """
    parser = push_parser()
    given = {**from_environment(["hub_endpoint"]), **vars(parser.parse_args(plain_flags(words)))}
    return given, parser.options_of(given)


def parse_demo(words: Sequence[str]) -> tuple[dict[str, Any], Options]:
    """Turn the words behind ``demo`` into its arguments.

    Raises:
        RecipeError: If there are others than a folder.
    """
    parser = Parser("demo")
    parser.add_argument("folder", nargs="?", default="models")
    given = vars(parser.parse_args(plain_flags(words)))
    return given, parser.options_of(given)


def parse_options(command: str, words: Sequence[str]) -> Options:
    """Turn the words behind a command that takes nothing else into its options.

    Raises:
        RecipeError: If there are others.
    """
    parser = Parser(command)
    given, rest = parser.parse_known_args(plain_flags(words))
    if rest:
        raise RecipeError(f"{command} takes nothing, but {rest[0]!r} is given", f"`{parser.prog} --help` tells more.")
    return parser.options_of(vars(given))


def parse_verify(words: Sequence[str]) -> tuple[dict[str, Any], Options]:
    """Turn the words behind ``verify`` into its arguments.

    Raises:
        RecipeError: If a flag is unknown or lacks its value.
    """
    parser = verify_parser()
    given = {**from_environment(["n_process", "hub_endpoint"]), **vars(parser.parse_args(plain_flags(words)))}
    return given, parser.options_of(given)


def push_parser() -> Parser:
    """The parser of ``push``."""
    parser = Parser("push")
    parser.add_argument("folder")
    parser.add_argument("name")
    for flag in ("--public", "--overwrite"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--hub_endpoint")
    return parser


def verify_parser() -> Parser:
    """The parser of ``verify``."""
    parser = Parser("verify")
    parser.add_argument("folder")
    for switch in ("--full", "--hub_anonymous"):
        parser.add_argument(switch, action="store_true")
    parser.add_argument("--hub_endpoint", type=SETTINGS["hub_endpoint"].read)
    for setting in ("--sample", "--n_process", "--seed"):
        parser.add_argument(setting, type=int)
    return parser


def plain_flags(words: Sequence[str]) -> list[str]:
    """Flags with underscores, short ones at full length."""
    return [f"--{word[2:].replace('-', '_')}" if word.startswith("--") else SHORT.get(word, word) for word in words]


def _normal(word: str) -> list[str]:
    """A flag with its name as the recipe has it; a negative number as argparse knows it."""
    if word.startswith("--") and len(word) > 2:
        name, equals, value = word[2:].partition("=")
        plain = name.replace("-", "_")
        switched = plain.removeprefix("no_")
        if plain != switched and _is_switch(switched) and not equals:
            return [f"--{switched}", "False"]
        known = plain if plain in (*OPTIONS, "html") else _known(name, plain)
        return [f"--{known}", value] if equals else [f"--{known}"]
    if word in SHORT:
        return [SHORT[word]]
    if re.match(rf"{NUMBER}.*,", word):
        return [number for part in word.split(",") if part for number in _normal(part)]
    if word.startswith("-") and len(word) > 1:
        try:
            number = Decimal(word)
        except InvalidOperation:
            raise RecipeError(
                f"There is no flag {word}", f"Flags begin with two dashes, but for {' and '.join(SHORT)}."
            ) from None
        if not number.is_finite() or abs(number.adjusted()) > MOST_DIGITS:
            raise RecipeError(f"{word} is not a number that any setting takes")
        return [format(number, "f")]
    return [word]


def _known(name: str, plain: str) -> str:
    try:
        return canonical_name(name)
    except RecipeError as error:
        raise RecipeError(error.message, closest(plain, OPTIONS).strip() or error.hint) from None


def _switched(words: Sequence[str]) -> list[str]:
    """A recipe behind a boolean flag or a list of numbers is no value of it."""
    done, last = list[str](), ""
    for word in words:
        flag = done[-1].removeprefix("--") if done and done[-1].startswith("--") else ""
        if _is_switch(flag) and _is_recipe(word):
            done.append("True")
        last = flag if flag else last
        if not flag and last in SETTINGS and SETTINGS[last].is_per_model and _is_recipe(word):
            done.insert(0, word)
        else:
            done.append(word)
    return done


def _listed(words: Sequence[str], always: bool) -> list[str]:
    """The values of a list, also where they were given as ``1,2`` or ``[1, 2]``.

    >>> _listed(["[1,", "2]"], always=True), _listed(["A,B"], always=False)
    (['1', '2'], ['A', 'B'])

    Args:
        words: As they were given.
        always: Whether no value has a comma or a bracket; else a word that is a path or a URL stays whole.
    """
    return [part for word in _bare(words, always) for part in _parts(word, always)]


def _bare(words: Sequence[str], always: bool) -> Sequence[str]:
    bracketed = words[0].startswith("[") and words[-1].endswith("]")
    if not bracketed or (not always and os.path.lexists(words[0])):
        return words
    *most, last = (words[0][1:], *words[1:])
    return [*most, last[:-1]]


def _parts(word: str, always: bool) -> Iterator[str]:
    if not always and ("," not in word or "://" in word or os.path.lexists(word)):
        if word:
            yield word
        return
    yield from (part.strip("\"' ") for part in word.split(",") if part.strip())


def _takes_words(setting: Setting) -> bool:
    return setting.takes_several or setting.is_per_model


def _is_recipe(word: str) -> bool:
    return word.endswith((".json", ".yaml", ".yml")) or os.path.isfile(word)


def _is_switch(name: str) -> bool:
    return name in SETTINGS and SETTINGS[name].is_switch
