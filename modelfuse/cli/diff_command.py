"""The command ``modelfuse diff``."""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Sequence
from typing import Any

from modelfuse.cli import console, progress
from modelfuse.cli.arguments import Options, Parser, plain_flags
from modelfuse.cli.drawing import add_drawing, drawing_of, print_written
from modelfuse.cli.setting_groups import SHARED, from_environment
from modelfuse.errors import RecipeError
from modelfuse.recipe.names import SETTINGS

#: Settings of a merge on another device, which are refused.
OF_DEVICES = ("device", "tensor_type", "gpu_memory")


def diff_parser() -> Parser:
    """The parser of ``diff``."""
    parser = Parser("diff")
    parser.add_argument("models", nargs="*", metavar="model")
    parser.add_argument("--base")
    parser.add_argument("--exact", action="store_true")
    for name in SHARED:
        setting = SETTINGS[name]
        if setting.is_switch:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", nargs="+" if setting.takes_several else None)
    for name in OF_DEVICES:
        parser.add_argument(f"--{name}", help=SUPPRESS)
    add_drawing(parser)
    return parser


def parse_diff(argv: Sequence[str]) -> tuple[dict[str, Any], Options]:
    """Parse the arguments of ``diff``: models, base, files to draw, and settings.

    Raises:
        RecipeError: If a flag is unknown or lacks its value.
    """
    parser = diff_parser()
    given = vars(parser.parse_intermixed_args(plain_flags(argv)))
    options = parser.options_of(given)
    for name in OF_DEVICES:
        if name in given:
            raise RecipeError(
                f"diff measures on the CPUs, so --{name} cannot be given",
                "Leave it out. Reading decides the time; --engine ray measures on the CPUs of a cluster.",
            )
    return {**from_environment(["n_process", "memory", "hub_endpoint"]), **given}, options


def run(argv: Sequence[str]) -> int:
    """Compare models and print the result; returns the exit status."""
    from modelfuse.inspection.diff import diff_named

    given, options = parse_diff(argv)
    console.configure_logs(options.verbose, options.log_file)
    drawing = drawing_of(given)
    drawing.check()
    models, base, exact = given.pop("models", []), given.pop("base", None), given.pop("exact", False)
    quiet = options.quiet
    found = diff_named(
        models, base, exact, given, lambda plan: progress.comparing(plan, quiet), progress.fetching(quiet)
    )
    if options.json:
        from modelfuse.cli.diff_document import of_diff
        from modelfuse.cli.json_output import write

        write(of_diff(found))
    elif not quiet:
        from modelfuse.cli.diff_view import show

        show(found)
    print_written(drawing.draw(found), options)
    return 0
