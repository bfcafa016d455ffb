"""Parse command-line arguments into settings and options."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NoReturn

from msgspec import Struct
from msgspec.structs import replace

from modelfuse.cli.setting_groups import PREFIX, from_environment
from modelfuse.errors import RecipeError
from modelfuse.recipe.checks import closest
from modelfuse.recipe.files import load_recipe
from modelfuse.recipe.hosts_in_files import without_hosts
from modelfuse.recipe.names import ANOTHER_WAY, SETTINGS, by_canonical_name, canonical_name
from modelfuse.recipe.schema import Setting

#: The most digits of a number before or after the point; no float has more.
MOST_DIGITS = 400
#: Options of every command: the field of :class:`Options`, its flags, and its description.
OPTIONS = {
    "quiet": (("--quiet", "-q"), "Print errors only."),
    "verbose": (("--verbose", "-v"), "Print details, with times and levels."),
    "json": (("--json",), "Write one JSON document to standard output."),
    "log_file": (("--log_file",), "Append all messages, with details, to this file."),
}
SHORT = {flags[-1]: flags[0] for flags, _ in OPTIONS.values() if len(flags) > 1}
#: The start of a number.
NUMBER = r"[-+]?(\d|\.\d)"


class Options(Struct, frozen=True):
    """The options of a command about its output.

    Attributes:
        quiet: Print errors only.
        verbose: Print details, with times and levels.
        json: Write one JSON document to standard output, and everything else to standard error.
        log_file: A file to append all messages to.
        html: For a merge, the file of its page.
    """

    quiet: bool = False
    verbose: bool = False
    json: bool = False
    log_file: Path | None = None
    html: Path | None = None


class Parser(argparse.ArgumentParser):
    """The parser of a command, with the options of every command.

    Args:
        command: The name of the command.
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
        """Remove the options from the parsed arguments, and return them."""
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
            parser.add_argument(f"--{name}", nargs="+" if _takes_list(setting) else None)
    return parser


def parse(
    argv: Sequence[str],
    command: str = "merge",
    defaults: Mapping[str, object] = {},
) -> tuple[dict[str, object], Options]:
    """Parse settings from a recipe file, environment variables and flags; later ones override earlier ones.

    Args:
        argv: The arguments after the command.
        command: The command, for messages; ``merge`` has additional flags.
        defaults: Values of settings that are not given.

    Raises:
        RecipeError: If a flag is unknown or lacks its value, or the recipe cannot be read.
    """
    plain = _switched([part for word in argv for part in _normal(word)])
    parser = merge_parser(command)  # After looking up the names, which may load methods of other packages.
    given = vars(parser.parse_args(plain))
    options = replace(parser.options_of(given), html=given.pop("html", None))
    for name in given.keys() & SETTINGS.keys():
        if _takes_list(SETTINGS[name]):
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


def parse_demo(argv: Sequence[str]) -> tuple[dict[str, Any], Options]:
    """Parse the arguments of ``demo``.

    Raises:
        RecipeError: If there are arguments other than a folder.
    """
    parser = Parser("demo")
    parser.add_argument("folder", nargs="?", default="models")
    given = vars(parser.parse_args(plain_flags(argv)))
    return given, parser.options_of(given)


def parse_options(command: str, argv: Sequence[str]) -> Options:
    """Parse the options of a command without other arguments.

    Raises:
        RecipeError: If there are other arguments.
    """
    parser = Parser(command)
    given, rest = parser.parse_known_args(plain_flags(argv))
    if rest:
        raise RecipeError(
            f"{command} takes no arguments, but got {rest[0]!r}", f"`{parser.prog} --help` shows the usage."
        )
    return parser.options_of(vars(given))


def plain_flags(argv: Sequence[str]) -> list[str]:
    """The arguments with underscores in flags, and long flags instead of short ones."""
    return [f"--{word[2:].replace('-', '_')}" if word.startswith("--") else SHORT.get(word, word) for word in argv]


def _normal(word: str) -> list[str]:
    """A flag with the canonical name of its setting; a negative number in a form that argparse accepts."""
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
                f"There is no flag {word}", f"Flags begin with two dashes, except for {' and '.join(SHORT)}."
            ) from None
        if not number.is_finite() or abs(number.adjusted()) > MOST_DIGITS:
            raise RecipeError(f"{word} is not a number that any setting accepts")
        return [format(number, "f")]
    return [word]


def _known(name: str, plain: str) -> str:
    try:
        return canonical_name(name)
    except RecipeError as error:
        raise RecipeError(error.message, closest(plain, OPTIONS).strip() or error.hint) from None


def _switched(argv: Sequence[str]) -> list[str]:
    """Keep argparse from taking a recipe after a boolean flag or a list of numbers as the flag's value."""
    done, last = list[str](), ""
    for word in argv:
        flag = done[-1].removeprefix("--") if done and done[-1].startswith("--") else ""
        if _is_switch(flag) and _is_recipe(word):
            done.append("True")
        last = flag if flag else last
        if not flag and last in SETTINGS and SETTINGS[last].is_per_model and _is_recipe(word):
            done.insert(0, word)
        else:
            done.append(word)
    return done


def _listed(values: Sequence[str], always: bool) -> list[str]:
    """The values of a list, which may be given as ``1 2``, ``1,2`` or ``[1, 2]``.

    >>> _listed(["[1,", "2]"], always=True), _listed(["A,B"], always=False)
    (['1', '2'], ['A', 'B'])

    Args:
        values: The arguments.
        always: Whether to split at commas always; else paths that exist and URLs are not split.
    """
    return [part for word in _without_brackets(values, always) for part in _parts(word, always)]


def _without_brackets(values: Sequence[str], always: bool) -> Sequence[str]:
    bracketed = values[0].startswith("[") and values[-1].endswith("]")
    if not bracketed or (not always and os.path.lexists(values[0])):
        return values
    *most, last = (values[0][1:], *values[1:])
    return [*most, last[:-1]]


def _parts(word: str, always: bool) -> Iterator[str]:
    if not always and ("," not in word or "://" in word or os.path.lexists(word)):
        if word:
            yield word
        return
    yield from (part.strip("\"' ") for part in word.split(",") if part.strip())


def _takes_list(setting: Setting) -> bool:
    return setting.takes_several or setting.is_per_model


def _is_recipe(word: str) -> bool:
    return word.endswith((".json", ".yaml", ".yml")) or os.path.isfile(word)


def _is_switch(name: str) -> bool:
    return name in SETTINGS and SETTINGS[name].is_switch
