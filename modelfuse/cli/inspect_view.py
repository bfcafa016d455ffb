"""Print the result of ``inspect``: facts, a tree of modules in 80 columns, and remarks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from modelfuse.cli.console import out
from modelfuse.cli.units import abbreviated, counted
from modelfuse.inspection.inspected_model import Inspection
from modelfuse.inspection.model_facts import AdapterFacts, TokenizerFacts
from modelfuse.inspection.module_tree import FoldedModule
from modelfuse.planning.tables import Row
from modelfuse.printable import printable
from modelfuse.recipe.sizes import size

#: Descriptions of the layouts and formats.
LAYOUTS = {"hf": "Hugging Face's layout, [out, in]", "paddle": "Paddle's layout, [in, out]"}
FORMATS = {"torch": "torch pickles", "paddle": ".pdparams pickles"}
#: Columns of the tree, and whether they are right-aligned.
TITLES = ("module", "shape", "dtype", "parameters", "bytes")
AT_RIGHT = (False, False, False, True, True)
GAP = "  "


def show(found: Inspection) -> None:
    """Print an inspection."""
    out.print("[bold]{}[/]", found.path)
    for title, text in _facts(found):
        out.print("  [bold]{}[/] {}", title, text)
    if found.adapter is not None:
        out.print("")
        out.table(("changes", "kind", "rank", "scale", "layers"), _targets(found.adapter))
    out.print("")
    for number, line in enumerate(_tree(found)):
        out.print("{}" if number else "[bold]{}[/]", line, wrap=False)
    if found.remarks:
        out.print("")
    for remark in found.remarks:
        out.log(remark.kind, "{}", remark.text)
        if remark.hint:
            out.print("  {}", remark.hint)


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    types = ", ".join(
        f"{name} {size(each.bytes)}" if len(found.dtypes) > 1 else name for name, each in found.dtypes.items()
    )
    yield "contains", f"{abbreviated(found.parameters)} parameters in {counted(len(found.tensors), 'tensor')}, {types}"
    stored = sum(each.bytes for each in found.shards)
    layout = f"; {LAYOUTS[found.layout]}" if found.layout else ""
    files = counted(len(found.shards), "file")
    yield "stored", f"{size(stored)} in {files} ({FORMATS.get(found.format, found.format)}){layout}"
    if found.adapter is not None:
        yield "adapter", _adapter(found.adapter)
    if found.config:
        yield "config", ", ".join(f"{name} {value}" for name, value in found.config.items())
    for tie in found.tied:
        yield "tied", f"{tie.name} is {tie.to} ({tie.why})"
    for name, parts in found.fused.items():
        yield "fused", f"{name}: {parts}"
    if found.left_out:
        reasons = dict.fromkeys(found.left_out.values())
        for reason in reasons:
            count = sum(each == reason for each in found.left_out.values())
            yield "left out", f"{counted(count, 'tensor')}: {reason}"
    if found.tokenizer is not None:
        yield "tokenizer", _tokenizer(found.tokenizer)
    elif found.adapter is None:
        yield "tokenizer", "none"


def _tokenizer(facts: TokenizerFacts) -> str:
    kind = "files in an unknown format" if facts.kind is None else f"{facts.kind}, {facts.tokens:,} tokens"
    added = f" ({facts.added:,} added)" if facts.added else ""
    special = "".join(f", {name.removesuffix('_token')} {token}" for name, token in facts.special.items())
    return f"{kind}{added}{special}, {'a' if facts.chat_template else 'no'} chat template"


def _adapter(facts: AdapterFacts) -> str:
    base = f" of {facts.base}" if facts.base else ""
    task = f", for {facts.task}" if facts.task else ""
    numbers = "" if facts.type in ("IA3", "TRAINABLE_TOKENS") else f", rank {facts.rank}, alpha {facts.alpha:g}"
    return f"{facts.type} ({facts.format}){numbers}{base}{task}"


def _targets(facts: AdapterFacts) -> Iterator[Row]:
    for each in facts.targets:
        scale = "" if each.scale is None else f"{each.scale:.4g}"
        rank = "" if each.rank is None else each.rank
        yield each.module, f"{each.kind}{' (DoRA)' if each.dora else ''}", rank, scale, each.layers
    for name in facts.whole:
        yield name, "whole", "", "", ""


def _tree(found: Inspection) -> Iterator[str]:
    """The lines of the tree, in columns."""
    rows = [_cells(depth, each) for top in found.modules for depth, each in top.rows()]
    shown = [TITLES, *rows, ("all", "", "", abbreviated(found.parameters), size(found.bytes))]
    widths = [max(len(row[column]) for row in shown) for column in range(len(TITLES))]
    others = sum(widths[1:]) + len(GAP) * (len(TITLES) - 1)
    if out.width is not None:
        widths[0] = min(widths[0], max(20, out.width - others))
    for row in shown:
        cells = (
            cell.rjust(width) if right else _fitted(cell, width).ljust(width)
            for cell, width, right in zip(row, widths, AT_RIGHT, strict=True)
        )
        yield GAP.join(cells).rstrip()


def _cells(depth: int, module: FoldedModule) -> Sequence[str]:
    name = "  " * depth + printable(module.name)
    numbers = (abbreviated(module.parameters), size(module.bytes))
    if module.shape is None:
        return (name, f"{module.copies} alike" if module.copies > 1 else "", "", *numbers)
    shape = "×".join(map(str, module.shape)) or "one number"
    times = f" ({module.copies} alike)" if module.copies > 1 else ""
    return (name, shape + times, module.dtype or "", *numbers)


def _fitted(text: str, width: int) -> str:
    """A text without its middle, if it is too long.

    >>> _fitted("vision_tower.encoder", 12)
    'vision…coder'
    """
    if len(text) <= width:
        return text
    half = width // 2
    return f"{text[:half]}…{text[len(text) - (width - half - 1) :]}"
