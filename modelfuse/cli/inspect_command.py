"""The command ``modelfuse inspect``."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from modelfuse.cli import console, progress
from modelfuse.cli.arguments import Options, Parser, plain_flags
from modelfuse.cli.setting_groups import from_environment
from modelfuse.recipe.names import SETTINGS


def inspect_parser() -> Parser:
    """The parser of ``inspect``."""
    parser = Parser("inspect")
    parser.add_argument("model")
    parser.add_argument("--merge_prefix", choices=SETTINGS["merge_prefix"].choices)
    parser.add_argument("--hub_endpoint")
    parser.add_argument("--hub_anonymous", action="store_true")
    return parser


def parse_inspect(argv: Sequence[str]) -> tuple[dict[str, Any], Options]:
    """Parse the arguments of ``inspect``.

    Raises:
        RecipeError: If a flag is unknown or lacks its value, or no model is given.
    """
    parser = inspect_parser()
    given = {**from_environment(["hub_endpoint"]), **vars(parser.parse_args(plain_flags(argv)))}
    return given, parser.options_of(given)


def run(argv: Sequence[str]) -> int:
    """Inspect a model and print the result; returns the exit status."""
    from modelfuse.inspection.inspect_model import inspect_named

    given, options = parse_inspect(argv)
    console.configure_logs(options.verbose, options.log_file)
    gc.disable()  # There are no reference cycles, as in a plan.
    try:
        found = inspect_named(given.pop("model"), **given, watch=progress.fetching(options.quiet))
    finally:
        gc.enable()
    if options.json:
        from modelfuse.cli.inspect_document import of_inspection
        from modelfuse.cli.json_output import write

        write(of_inspection(found))
    else:
        from modelfuse.cli.inspect_view import show

        show(found)
    return 0
