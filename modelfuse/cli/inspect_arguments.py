"""The words behind ``modelfuse inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modelfuse.cli.arguments import Options, Parser, plain_flags
from modelfuse.cli.groups import from_environment
from modelfuse.recipe.names import SETTINGS


def inspect_parser() -> Parser:
    """The parser of ``inspect``."""
    parser = Parser("inspect")
    parser.add_argument("model")
    parser.add_argument("--merge_prefix", choices=SETTINGS["merge_prefix"].choices)
    parser.add_argument("--hub_endpoint")
    parser.add_argument("--hub_anonymous", action="store_true")
    return parser


def parse_inspect(words: Sequence[str]) -> tuple[dict[str, Any], Options]:
    """Turn the words behind ``inspect`` into its arguments.

    Raises:
        RecipeError: If a flag is unknown or lacks its value, or no model is named.
    """
    parser = inspect_parser()
    given = {**from_environment(["hub_endpoint"]), **vars(parser.parse_args(plain_flags(words)))}
    return given, parser.options_of(given)
