"""Print help: commands, settings, methods."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from modelfuse.cli.arguments import OPTIONS
from modelfuse.cli.console import out
from modelfuse.cli.help_pages import PAGES
from modelfuse.cli.setting_groups import groups
from modelfuse.methods.registry import COMBINATIONS, MERGE_METHODS, SPARSIFIERS
from modelfuse.methods.spec import Step
from modelfuse.recipe.names import SETTINGS
from modelfuse.recipe.schema import Setting
from modelfuse.recipe.sizes import size

#: The greatest width of text.
WIDTH = 80
INDENT = " " * 6


def usage() -> None:
    """Print the list of commands."""
    out.print("usage: modelfuse COMMAND [...]\n")
    for name, page in PAGES.items():
        out.print("  [bold]{}[/]", name)
        out.print("      {}", page.summary)
    out.print("\nHelp on a command:")
    out.command("modelfuse help merge")


def help_page(command: str) -> None:
    """Print the help of a command."""
    page = PAGES[command]
    out.print("usage: {}\n\n{}", page.usage, page.summary)
    if page.examples:
        out.print("\n[bold]Examples[/]\n")
        for example in page.examples:
            out.command(example)
    if page.own:
        _section("Flags", ((flag, [about]) for flag, about in page.own))
    if page.takes_settings:
        for title, names in groups().items():
            _section(title, ((f"--{name} {placeholder_of(SETTINGS[name])}", _about(SETTINGS[name])) for name in names))
    flags_of = {
        name: ", ".join(flags) + (" FILE" if name == "log_file" else "") for name, (flags, _) in OPTIONS.items()
    }
    if command not in ("help", "completion"):
        _section("Messages", ((flags_of[name], [about]) for name, (_, about) in OPTIONS.items()))
    if page.ending:
        out.print("")
        for line in textwrap.wrap(page.ending, WIDTH, break_on_hyphens=False):
            out.print("{}", line)


def placeholder_of(setting: Setting) -> str:
    """The placeholder for a setting's value in help."""
    if setting.is_switch:
        return "[true|false]"
    value = "SIZE" if setting.is_size else "N" if setting.is_number else "VALUE" if setting.choices else setting.noun
    return f"{value} ..." if setting.takes_several or setting.is_per_model else value


def default_of(setting: Setting) -> str:
    """The default of a setting, as text."""
    if setting.is_required:
        return "required"
    if setting.otherwise:
        return setting.otherwise
    if isinstance(setting.default, bool):
        return str(setting.default).lower()
    if setting.is_size and isinstance(setting.default, int):
        return size(setting.default)
    return f"{setting.default:g}" if isinstance(setting.default, float) else str(setting.default)


def _about(setting: Setting) -> list[str]:
    lines = [setting.description]
    if setting.choices:
        lines.append(f"One of: {', '.join(setting.choices)}.")
    if setting.is_per_model:
        lines.append("One for all, or one per model.")
    if setting.aliases:
        lines.append(f"Also called {', '.join(setting.aliases)}.")
    return [*lines, "Required." if setting.is_required else f"Default: {default_of(setting)}."]


def _section(title: str, entries: Iterable[tuple[str, Sequence[str]]]) -> None:
    out.print("\n[bold]{}[/]\n", title)
    for flag, about in entries:
        out.print("  [bold]{}[/]", flag)
        out.print("{}", textwrap.fill(" ".join(about), WIDTH, initial_indent=INDENT, subsequent_indent=INDENT))


def methods() -> None:
    """Print the methods and their steps, with settings, formula and paper."""
    pairs = [(name, sparsify_type or "–", merge_type) for name, (sparsify_type, merge_type) in MERGE_METHODS.items()]
    out.table(("merge_method", "sparsify_type", "merge_type"), pairs)
    for step in steps():
        out.print("\n[bold]{}[/] ({}): {}", step.name, step.kind, step.summary)
        out.print("  formula: {}", step.formula)
        out.print("  settings: {}", ", ".join(f"{name} = {default}" for name, default in step.settings.items()) or "–")
        out.print("  paper: {}", step.paper)
        if step.measured:
            out.print("  measured: {}", step.measured)
    out.print("\nMeasurements: docs/quality.md; how to choose a method: docs/choosing.md")


@dataclass(frozen=True)
class StepFacts:
    """A step of a method, with its settings and their defaults as text."""

    name: str
    kind: Literal["sparsify_type", "merge_type"]
    summary: str
    formula: str
    paper: str
    measured: str
    settings: dict[str, str]


def steps() -> Iterator[StepFacts]:
    """All sparsifiers and combinations."""
    for sparsifier in SPARSIFIERS.values():
        yield _facts(sparsifier, "sparsify_type")
    for combination in COMBINATIONS.values():
        yield _facts(combination, "merge_type", () if combination.weights == "none" else ("weight_list",))


def _facts(step: Step, kind: Literal["sparsify_type", "merge_type"], more: Sequence[str] = ()) -> StepFacts:
    names = [*more, *(each.name for each in step.parameters)]
    settings = {name: default_of(SETTINGS[name]) for name in names if name in SETTINGS}
    return StepFacts(step.name, kind, step.summary, step.formula, step.paper, step.measured, settings)
