"""The command ``modelfuse collect``."""

from __future__ import annotations

from collections.abc import Sequence

from modelfuse.cli import console
from modelfuse.cli.arguments import Parser, plain_flags


def collect_parser() -> Parser:
    """The parser of ``collect``."""
    parser = Parser("collect")
    parser.add_argument("model")
    for flag in ("--data", "--output"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--device", choices=("cpu", "gpu"))
    parser.add_argument("--memory")
    parser.add_argument("--overwrite", action="store_true")
    return parser


def run(argv: Sequence[str]) -> int:
    """Run a model over texts, and write the Gram matrices of its layers' inputs; returns the exit status.

    Raises:
        RecipeError: If a flag is unknown, lacks its value or is missing.
    """
    from modelfuse.inspection.collect import collect

    parser = collect_parser()
    given = vars(parser.parse_args(plain_flags(argv)))
    options = parser.options_of(given)
    console.configure_logs(options.verbose, options.log_file)
    model, data, output = (given.pop(name) for name in ("model", "data", "output"))
    found = collect(model, data, output, **given)
    if options.json:
        from modelfuse.cli.documents import CollectDocument
        from modelfuse.cli.json_output import write

        write(CollectDocument(output=str(found.output), modules=found.modules, tokens=found.tokens))
    elif not options.quiet:
        text = "[green]wrote[/] {}: Gram matrices of the inputs of {} modules, {} tokens"
        console.out.log("info", text, found.output, str(found.modules), str(found.tokens))
    return 0
