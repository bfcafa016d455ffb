"""The command ``modelfuse verify``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modelfuse.cli import console
from modelfuse.cli.arguments import Options, Parser, plain_flags
from modelfuse.cli.setting_groups import from_environment
from modelfuse.errors import RecipeError
from modelfuse.recipe.names import SETTINGS
from modelfuse.storage import PathOrUrl, path_or_url


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


def parse_verify(argv: Sequence[str]) -> tuple[dict[str, Any], Options]:
    """Parse the arguments of ``verify``.

    Raises:
        RecipeError: If a flag is unknown or lacks its value.
    """
    parser = verify_parser()
    given = {**from_environment(["n_process", "hub_endpoint"]), **vars(parser.parse_args(plain_flags(argv)))}
    return given, parser.options_of(given)


def run(argv: Sequence[str]) -> int:
    """Verify an output; returns the exit status, 2 if there are problems."""
    from modelfuse.cli import progress, render
    from modelfuse.inspection.verify import verify_output
    from modelfuse.kernels.jit.compile import announcing

    given, options = parse_verify(argv)
    console.configure_logs(options.verbose, options.log_file)
    folder, tell = _folder(given.pop("folder")), render.notes_unless(options.quiet)
    with progress.verifying(folder, options.quiet) as advance, announcing(tell):
        found = verify_output(folder, **given, progress=advance, tell=tell)
    render.verification(found, options.quiet or options.json)
    if options.json:
        from modelfuse.cli import documents, json_output

        json_output.write(documents.of_verification(found))
    return 0 if found.holds else 2


def _folder(text: str) -> PathOrUrl:
    try:
        return path_or_url(text)
    except ValueError as error:
        raise RecipeError(f"{text}: {error}", "`modelfuse help verify` shows the usage.") from None
