"""The command ``modelfuse push``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelfuse.cli import console
from modelfuse.cli.arguments import Options, Parser, plain_flags
from modelfuse.cli.setting_groups import from_environment


def push_parser() -> Parser:
    """The parser of ``push``."""
    parser = Parser("push")
    parser.add_argument("folder")
    parser.add_argument("name")
    for flag in ("--public", "--overwrite"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--hub_endpoint")
    return parser


def parse_push(argv: Sequence[str]) -> tuple[dict[str, Any], Options]:
    """Parse the arguments of ``push``.

    Raises:
        RecipeError: If a flag is unknown or lacks its value.
    """
    parser = push_parser()
    given = {**from_environment(["hub_endpoint"]), **vars(parser.parse_args(plain_flags(argv)))}
    return given, parser.options_of(given)


def run(argv: Sequence[str]) -> int:
    """Upload an output to a hub; returns the exit status."""
    from modelfuse.cli import render
    from modelfuse.planning.hub.upload import push_folder

    given, options = parse_push(argv)
    console.configure_logs(options.verbose, options.log_file)
    folder, name, endpoint = Path(given.pop("folder")), given.pop("name"), given.pop("hub_endpoint", None)
    pushed = push_folder(folder, name, endpoint=endpoint, tell=render.notes_unless(options.quiet), **given)
    if options.json:
        from modelfuse.cli import documents, json_output

        json_output.write(documents.of_upload(pushed))
    elif not options.quiet:
        render.pushed(pushed)
    return 0
