"""``modelfuse tune``: its words as a request, and what it says."""

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

#: Its own flags: type, and how many values.
OWN: Mapping[str, tuple[Any, str | None]] = {
    "evaluate": (str, None), "data": (Path, "+"), "budget": (int, None), "groups": (int, None),
    "direction": (str, "+"), "sampler": (str, None), "jobs": (int, None), "scratch": (Path, None),
}  # fmt: skip
SWITCHES = ("attention_apart",)


class _Own(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(message[0].upper() + message[1:], "`modelfuse tune --help` lists every setting.")


def tune_parser() -> Parser:
    """All that ``tune`` takes, for completion."""
    parser = merge_parser("tune")
    _add(parser)
    return parser


def parse_tune(words: Sequence[str], defaults: Mapping[str, object]) -> tuple[TuningRequest, Options]:
    """Turn the words behind ``tune`` into a request.

    Raises:
        RecipeError: If a flag is unknown or lacks its value, or the recipe cannot be read.
    """
    parser = _Own(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    _add(parser)
    own, rest = parser.parse_known_args([_normal(word) for word in words])
    given = vars(own)
    settings, options = parse(rest, "tune", defaults)
    evaluate, data = given.pop("evaluate", None), given.pop("data", [])
    if evaluate is None:
        raise RecipeError("evaluate is not given", "Say how good a merge is: --evaluate 'python eval.py {model}'.")
    return TuningRequest(settings, evaluation_of(evaluate, data), **given), options


def evaluation_of(evaluate: str, data: Sequence[Path]) -> Evaluation:
    """What ``--evaluate`` means.

    Raises:
        RecipeError: If data are given that nothing reads.
    """
    if evaluate == PERPLEXITY:
        return Perplexity(data)
    if data:
        raise RecipeError(f"data is for --evaluate {PERPLEXITY}; a command knows its own")
    return Command(evaluate)


def run(words: list[str], defaults: Mapping[str, object]) -> int:
    """The command."""
    from modelfuse.cli import progress

    request, options = parse_tune(words, defaults)
    console.begin_logs(options.verbose, options.log_file)
    tell = (lambda _: None) if options.quiet else (lambda text: console.err.tell("info", "{}", text))
    found = tune(request, tell, progress.watch(options.quiet))
    if options.json:
        from modelfuse.cli.json_output import write
        from modelfuse.cli.tune_document import of_tuned

        write(of_tuned(found))
    elif not options.quiet:
        tuned(found)
    return 0


def tuned(found: Tuned) -> None:
    """The closing summary."""
    first, best = found.trials[0], found.best
    names = [*found.directions]
    rows = [["as it was", *(f"{first.numbers[name]:.6g}" for name in names)]]
    rows += [[f"trial {each.number}", *(f"{each.numbers[name]:.6g}" for name in names)] for each in found.front]
    console.out.table(("", *names), rows)
    what = f"trial {best.number} of {len(found.trials)}"
    console.out.tell("info", "[green]merged[/] with the settings of {} into [bold]{}[/]", what, found.output_path)
    console.out.say("the study, its table and picture are in {}", found.study_path)
    if len(found.front) > 1:
        console.out.say("another point of the front:")
        other = found.study_path / "front" / f"trial-{found.front[-1].number}.yaml"
        console.out.command(f"modelfuse merge {other} --output_path {found.output_path}-{found.front[-1].number}")


def _add(parser: argparse.ArgumentParser) -> None:
    for name, (kind, count) in OWN.items():
        parser.add_argument(f"--{name}", type=kind, nargs=count, choices=SAMPLERS if name == "sampler" else None)
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")


def _normal(word: str) -> str:
    """One of its own flags, with underscores."""
    name, equals, value = word.partition("=")
    plain = name[2:].replace("-", "_")
    return f"--{plain}{equals}{value}" if word.startswith("--") and plain in (*OWN, *SWITCHES) else word
