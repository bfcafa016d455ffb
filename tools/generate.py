"""Generate reference pages, schemas and keywords from the code: ``python tools/generate.py``. Tests compare them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from keyword import iskeyword
from pathlib import Path

from msgspec.json import schema

from modelfuse.cli.arguments import OPTIONS
from modelfuse.cli.documents import DOCUMENTS
from modelfuse.cli.help import default_of, steps
from modelfuse.cli.help_pages import PAGES
from modelfuse.cli.json_output import Document
from modelfuse.cli.setting_groups import FROM_ENVIRONMENT, PREFIX, groups
from modelfuse.methods.registry import MERGE_METHODS
from modelfuse.recipe.names import SETTINGS, SYNONYMS
from modelfuse.recipe.schema import Setting

ROOT = Path(__file__).parent.parent
WRITTEN = "<!-- Written by tools/generate.py; edit the code instead. -->\n"


def files() -> dict[str, str]:
    """The content of every generated file, by its path."""
    return {
        "docs/reference/settings.md": "\n".join(_settings()) + "\n",
        "docs/reference/methods.md": "\n".join(_methods()) + "\n",
        "docs/reference/command-line.md": "\n".join(_command_line()) + "\n",
        "modelfuse/api/keywords.py": "\n".join(_keywords()) + "\n",
        **{f"docs/schemas/{_name(kind)}.json": _schema(kind) for kind in DOCUMENTS},
    }


def _keywords() -> Iterator[str]:
    yield '"""The settings as keyword arguments, for type checkers and editors. Written by tools/generate.py."""'
    yield "\n# fmt: off\n# ruff: noqa: E501"
    yield "from collections.abc import Sequence"
    yield "from os import PathLike"
    yield "from typing import Any, Literal, TypedDict"
    yield "\nfrom modelfuse.storage import Url"
    yield "\nPath = str | PathLike[str] | Url"
    yield "\n\nclass Keywords(TypedDict, total=False):"
    yield '    """Every setting; see :class:`modelfuse.Recipe`."""\n'
    for name, setting in SETTINGS.items():
        yield f"    {name}{'_' if iskeyword(name) else ''}: {_type(name, setting)}"
    yield "    model_path_str: str"
    yield "    lora_model_path: Path"
    for name, plain in SYNONYMS.items():
        if not name.endswith("_"):
            yield f"    {name}: {_type(plain, SETTINGS[plain])}"


def _type(name: str, setting: Setting) -> str:
    """The Python type of a setting."""
    one = "str"
    if setting.choices:
        one = f"Literal[{', '.join(f'{chr(34)}{each}{chr(34)}' for each in setting.choices)}] | str"
    elif setting.is_switch:
        one = "bool"
    elif setting.is_size:
        one = "int | str"
    elif setting.is_number:
        one = "float" if setting.is_fraction else "int"
    elif setting.noun in ("PATH", "MODEL"):
        one = "Path"
    if name == "lambda":
        one = "float | str"
    if name == "rules":
        one = "Any"
    several = f"Sequence[{one}]" if setting.takes_several else one
    return several if setting.default is not None else f"{several} | None"


def _name(kind: type[Document]) -> str:
    """The command whose document it is."""
    return kind.__name__.removesuffix("Document").lower()


def _schema(kind: type) -> str:
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps({**head, **schema(kind)}, indent=2) + "\n"


def _row(*cells: object) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _settings() -> Iterator[str]:
    yield WRITTEN
    yield "# Settings\n"
    yield "The same names are flags (`--reserve_p`, `--reserve-p`), keys of a recipe, and arguments in Python."
    for title, names in groups().items():
        yield f"\n## {title}\n"
        yield _row("setting", "default", "what it does")
        yield _row("---", "---", "---")
        for name in names:
            setting = SETTINGS[name]
            choices = f" One of {', '.join(f'`{each}`' for each in setting.choices)}." if setting.choices else ""
            yield _row(f"`{name}`", default_of(setting), setting.description + choices)
    yield "\n`model_path_str A,B` is `model_path_list A B`; `lora_model_path L` is the same with one adapter."


def _methods() -> Iterator[str]:
    yield WRITTEN
    yield "# Methods\n"
    yield _row("merge_method", "sparsify_type", "merge_type")
    yield _row("---", "---", "---")
    for name, (sparsify_type, merge_type) in MERGE_METHODS.items():
        yield _row(f"`{name}`", f"`{sparsify_type}`" if sparsify_type else "–", f"`{merge_type}`")
    for step in steps():
        yield f"\n## {step.name} ({step.kind})\n"
        yield f"{step.summary}\n"
        yield f"- formula: {step.formula}"
        yield f"- settings: {', '.join(f'`{name}` ({default})' for name, default in step.settings.items())}"
        yield f"- paper: {step.paper}"
        if step.measured:
            yield f"- measured: {step.measured}"


def _command_line() -> Iterator[str]:
    yield WRITTEN
    yield "# The command line"
    for name, page in PAGES.items():
        yield f"\n## modelfuse {name}\n"
        yield f"{page.summary}\n"
        yield f"    {page.usage}\n"
        if page.examples:
            yield "Examples:\n"
            yield from (f"    {line}" for example in page.examples for line in example.splitlines())
            yield ""
        if page.own:
            yield from (f"- `{flag}`: {about}" for flag, about in page.own)
            yield ""
        if page.takes_settings:
            yield "Takes every [setting](settings.md) as a flag, and a recipe: a YAML or JSON file of the same names."
    yield "\n## Options of every command\n"
    yield from (f"- `{', '.join(flags)}`: {about}" for flags, about in OPTIONS.values())
    names = ", ".join(_link(_name(kind)) for kind in DOCUMENTS)
    yield "\n`--json` always writes one document to standard output, and everything else to standard error."
    yield f"The forms are described by JSON Schemas: {names}."
    yield "`document` names the form and its version, which changes with every change except additions."
    yield "\n## Environment variables\n"
    yield "Environment variables give settings of the machine. They override a recipe, and flags override them;"
    yield "none of them changes the bytes of the output.\n"
    yield from (f"- `{PREFIX}{name.upper()}`" for name in (*FROM_ENVIRONMENT, "log_file"))
    yield "\n## Exit status\n"
    yield from ("- 0: done", "- 1: the system or modelfuse itself failed: a full disk, no memory, a bug",
                "- 2: the request or an input is wrong, or `verify` found a problem", "- 130: interrupted")  # fmt: skip


def _link(name: str) -> str:
    return f"[`{name}`](../schemas/{name}.json)"


if __name__ == "__main__":
    for name, text in files().items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_text(text, encoding="utf-8")
