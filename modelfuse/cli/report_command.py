"""The command ``modelfuse report``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modelfuse.cli import console, progress
from modelfuse.cli.arguments import Options, Parser, plain_flags
from modelfuse.cli.drawing import Drawing, add_drawing, drawing_of, print_written
from modelfuse.cli.setting_groups import from_environment
from modelfuse.storage import path_or_url


def report_parser() -> Parser:
    """The parser of the command's arguments."""
    parser = Parser("report")
    parser.add_argument("folder")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--n_process")
    parser.add_argument("--memory")
    add_drawing(parser)
    return parser


def parse_report(argv: Sequence[str]) -> tuple[dict[str, Any], Drawing, Options]:
    """Parse the arguments of ``report``.

    Raises:
        RecipeError: If a flag is unknown or lacks its value.
    """
    parser = report_parser()
    given: dict[str, Any] = vars(parser.parse_args(plain_flags(argv)))
    options, drawing = parser.options_of(given), drawing_of(given)
    return {**from_environment(["n_process", "memory"]), **given}, drawing, options


def run(argv: Sequence[str]) -> int:
    """Compare an output with its inputs and print the result; returns the exit status."""
    from modelfuse.inspection.report_output import report_output

    given, drawing, options = parse_report(argv)
    console.configure_logs(options.verbose, options.log_file)
    drawing.check(of_merge=True)
    folder = path_or_url(given.pop("folder"))
    found = report_output(folder, **given, shown=lambda plan: progress.comparing(plan, options.quiet))
    if options.json:
        from modelfuse.cli.json_output import write
        from modelfuse.cli.report_document import of_report

        write(of_report(found))
    elif not options.quiet:
        from modelfuse.cli.report_view import show

        show(found)
    print_written(drawing.draw(found), options)
    return 0
