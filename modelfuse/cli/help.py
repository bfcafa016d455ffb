"""The pages that tell how modelfuse is used: commands, settings, methods."""

from __future__ import annotations

from collections.abc import Mapping

from rich.markup import escape
from rich.table import Table

from modelfuse.cli.render import out, size
from modelfuse.methods.registry import MERGE_METHODS, MERGES, SPARSIFIERS, describe, parameters
from modelfuse.recipe.recipe import SETTINGS


def usage(line: str, commands: Mapping[str, str]) -> None:
    """What there is to say first."""
    out.print(f"usage: {escape(line)}\n")
    for name, summary in commands.items():
        out.print(f"  [bold]{name:8}[/] {summary}")
    out.print("\n`modelfuse merge --help` lists every setting.")


def help_page(line: str, summary: str, command: str) -> None:
    """Every setting with its default, from the recipe itself."""
    out.print(f"usage: {escape(line.replace('{merge,check,verify,methods}', command))}\n\n{summary}\n")
    table = Table(box=None, pad_edge=False)
    for title in ("setting", "default", "what it does"):
        table.add_column(title, no_wrap=title == "setting")
    for name, setting in SETTINGS.items():
        default = "required" if setting.is_required else _plain(setting.default)
        table.add_row(f"--{name}", escape(default), escape(setting.description))
    out.print(table, soft_wrap=False)
    out.print(
        "\nDashes and underscores are equal. Booleans: --rescale, --rescale False, --no_rescale."
        "\n--model_path_str A,B is --model_path_list A B; --lora_model_path L is the same with one adapter."
        "\nA recipe file has the same names; flags override it."
    )


def verify_help(line: str, summary: str) -> None:
    """What ``verify`` takes."""
    out.print(f"usage: {escape(line)}\n\n{summary}\n")
    for name, what in (
        ("--full", "Merge every tensor again and compare; fails where an input is missing."),
        ("--sample N", "Merge N tensors again; by default as many as read and compare about 256 MB."),
        ("--n_process N", "Parallel workers (default: one a processor, up to eight)."),
        ("--seed N", "Choose the same sample again (default: another one each time)."),
        ("--quiet", "Say only what is wrong."),
    ):
        out.print(f"  {name:14} {what}")
    out.print("\nExit status: 0 if all holds, 2 if anything is wrong.")


def methods() -> None:
    """What exists, with settings, formula and paper."""
    names = Table("merge_method", "sparsify_type", "merge_type", title="Names of the usual pairs", title_justify="left")
    for name, (sparsify_type, merge_type) in MERGE_METHODS.items():
        names.add_row(name, sparsify_type or "–", merge_type)
    out.print(names)
    for title, steps in (("sparsify_type", SPARSIFIERS), ("merge_type", MERGES)):
        for name, function in steps.items():
            about = describe(function)
            out.print(f"\n[bold]{name}[/] ({title}): {escape(about.summary)}")
            settings = ", ".join(f"{key} = {_plain(value)}" for key, value in parameters(function).items())
            out.print(f"  formula   {escape(about.formula)}")
            out.print(f"  settings  {escape(settings or 'weight_list, normalize')}")
            out.print(f"  paper     {escape(about.paper)}")


def _plain(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int) and value >= 10**6:
        return size(value)
    return "–" if value == () else str(value)
