"""The command ``modelfuse tune``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from modelfuse.cli import console
from modelfuse.cli.arguments import Options, Parser, merge_parser, parse
from modelfuse.errors import RecipeError
from modelfuse.execution.tuning.evaluation import Command, Evaluation
from modelfuse.execution.tuning.perplexity import NAME as PERPLEXITY
from modelfuse.execution.tuning.perplexity import Perplexity
from modelfuse.execution.tuning.request import Tuned, TuningRequest
from modelfuse.execution.tuning.study import SAMPLERS
from modelfuse.execution.tuning.tune import tune

#: Its own flags: type, and number of values as argparse's nargs.
OWN: Mapping[str, tuple[Any, str | None]] = {
    "evaluate": (str, None), "data": (Path, "+"), "budget": (int, None), "groups": (int, None),
    "direction": (str, "+"), "sampler": (str, None), "jobs": (int, None), "scratch": (Path, None),
}  # fmt: skip
SWITCHES = ("attention_apart",)


class _TuneParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(message[0].upper() + message[1:], "`modelfuse tune --help` lists every setting.")


def tune_parser() -> Parser:
    """The parser of all arguments of ``tune``, for completion."""
    parser = merge_parser("tune")
    _add(parser)
    return parser


def parse_tune(argv: Sequence[str], defaults: Mapping[str, object]) -> tuple[TuningRequest, Options]:
    """Parse the arguments of ``tune`` into a request.

    Raises:
        RecipeError: If a flag is unknown or lacks its value, or the recipe cannot be read.
    """
    parser = _TuneParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    _add(parser)
    own, rest = parser.parse_known_args([_normal(word) for word in argv])
    given = vars(own)
    settings, options = parse(rest, "tune", defaults)
    evaluate, data = given.pop("evaluate", None), given.pop("data", [])
    if evaluate is None:
        raise RecipeError("evaluate is not given", "Give a command: --evaluate 'python eval.py {model}'.")
    return TuningRequest(settings, evaluation_of(evaluate, data), **given), options


def evaluation_of(evaluate: str, data: Sequence[Path]) -> Evaluation:
    """The evaluation of ``--evaluate`` and ``--data``.

    Raises:
        RecipeError: If ``data`` is given for a command.
    """
    if evaluate == PERPLEXITY:
        return Perplexity(data)
    if data:
        raise RecipeError(f"data is for --evaluate {PERPLEXITY}; a command reads its own data")
    return Command(evaluate)


def run(argv: list[str], defaults: Mapping[str, object]) -> int:
    """Search settings, and write the best merge; returns the exit status."""
    from modelfuse.cli import progress

    request, options = parse_tune(argv, defaults)
    console.configure_logs(options.verbose, options.log_file)
    tell = (lambda _: None) if options.quiet else (lambda text: console.err.log("info", "{}", text))
    found = tune(request, tell, progress.fetching(options.quiet))
    if options.json:
        from modelfuse.cli.json_output import write
        from modelfuse.cli.tune_document import of_tuned

        write(of_tuned(found))
    elif not options.quiet:
        tuned(found)
    return 0


def tuned(found: Tuned) -> None:
    """Print the summary of a search."""
    first, best = found.trials[0], found.best
    names = [*found.directions]
    rows = [["recipe as given", *(f"{first.numbers[name]:.6g}" for name in names)]]
    rows += [[f"trial {each.number}", *(f"{each.numbers[name]:.6g}" for name in names)] for each in found.front]
    console.out.table(("", *names), rows)
    what = f"trial {best.number} of {len(found.trials)}"
    console.out.log("info", "[green]merged[/] with the settings of {} into [bold]{}[/]", what, found.output_path)
    console.out.print("the study, its table and picture are in {}", found.study_path)
    if len(found.front) > 1:
        console.out.print("another point of the front:")
        other = found.study_path / "front" / f"trial-{found.front[-1].number}.yaml"
        console.out.command(f"modelfuse merge {other} --output_path {found.output_path}-{found.front[-1].number}")


def _add(parser: argparse.ArgumentParser) -> None:
    for name, (kind, count) in OWN.items():
        parser.add_argument(f"--{name}", type=kind, nargs=count, choices=SAMPLERS if name == "sampler" else None)
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")


def _normal(word: str) -> str:
    """An argument with underscores, if it is one of the command's own flags."""
    name, equals, value = word.partition("=")
    plain = name[2:].replace("-", "_")
    return f"--{plain}{equals}{value}" if word.startswith("--") and plain in (*OWN, *SWITCHES) else word
