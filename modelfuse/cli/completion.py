"""What makes a shell complete commands, settings and their values, written by shtab."""

from __future__ import annotations

import argparse

from modelfuse.cli.arguments import Parser, merge_parser, push_parser, verify_parser
from modelfuse.cli.collect_command import collect_parser
from modelfuse.cli.diff_command import diff_parser
from modelfuse.cli.help_pages import PAGES
from modelfuse.cli.inspect_command import inspect_parser
from modelfuse.cli.report_command import report_parser
from modelfuse.cli.tune import tune_parser
from modelfuse.recipe.names import SETTINGS

SHELLS = ("bash", "zsh", "tcsh")
#: Of commands that take neither settings nor options alone.
OWN_PARSERS = {
    "verify": verify_parser, "push": push_parser, "inspect": inspect_parser, "diff": diff_parser,
    "report": report_parser, "tune": tune_parser, "collect": collect_parser,
}  # fmt: skip
#: How names of arguments end that are paths.
PATHS = (
    "path",
    "path_list",
    "folder",
    "model",
    "models",
    "base",
    "recipe",
    "log_file",
    "html",
    "image",
    "data",
    "scratch",
)


def script(shell: str) -> str:
    """The script for one of ``SHELLS``."""
    import shtab

    parser = argparse.ArgumentParser("modelfuse", add_help=False)
    commands = parser.add_subparsers()
    for name, page in PAGES.items():
        described = {"merge": merge_parser, "check": merge_parser}.get(name, Parser)(name)
        if name in OWN_PARSERS:
            described = OWN_PARSERS[name]()
        for action in described._actions:
            setting = SETTINGS.get(action.dest)
            if setting is not None and setting.choices:
                action.choices = setting.choices
            action.help = setting.description.replace("%", "%%") if setting is not None else action.help
            if action.dest.endswith(PATHS):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        if name in ("completion", "help"):
            described.add_argument("what", choices=SHELLS if name == "completion" else [*PAGES])
        commands.add_parser(name, help=page.summary, parents=[described], add_help=False)
    return str(shtab.complete(parser, shell))
