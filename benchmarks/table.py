"""Summarize samples as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from measure import Sample
from programs import COPY, MODELFUSE
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Summary:
    """The results of one tool for one method.

    Attributes:
        seconds: The median over the rounds.
        fastest: The minimum over the rounds.
        gigabytes_per_second: The bytes that the copy reads and writes, per median second.
        ratio: The median over the rounds of the ratio of this tool's seconds to the copy's in the same round.
        peak_bytes: The peak memory over all rounds.
    """

    method: str
    tool: str
    seconds: float
    fastest: float
    gigabytes_per_second: float
    ratio: float
    peak_bytes: int


def summarise(method: str, tool: str, samples: Sequence[Sample], copies: Sequence[Sample], size: int) -> Summary:
    """Summarize the rounds of one tool; ``size`` is the number of bytes that the copy reads and writes."""
    seconds = [sample.seconds for sample in samples]
    ratios = [sample.seconds / copy.seconds for sample, copy in zip(samples, copies, strict=False)]
    return Summary(
        method=method,
        tool=tool,
        seconds=median(seconds),
        fastest=min(seconds),
        gigabytes_per_second=size / 1e9 / median(seconds),
        ratio=median(ratios),
        peak_bytes=max(sample.peak_bytes for sample in samples),
    )


def rich_table(summaries: Iterable[Summary], title: str) -> Table:
    """A table with a row for each method and tool."""
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    table.add_column("tool")
    for heading in ("median s", "min s", "GB/s", "× copy", "peak MB"):
        table.add_column(heading, justify="right")
    last = None
    for each in summaries:
        if last not in (None, each.method):
            table.add_section()
        table.add_row(
            "" if each.method == last else each.method,
            each.tool,
            f"{each.seconds:.2f}",
            f"{each.fastest:.2f}",
            f"{each.gigabytes_per_second:.2f}",
            f"{each.ratio:.2f}",
            f"{each.peak_bytes / 1e6:,.0f}",
            style="bold" if each.tool == MODELFUSE else "dim" if each.tool == COPY else "",
        )
        last = each.method
    return table


def markdown_table(summaries: Sequence[Summary]) -> str:
    """A Markdown table with a row for each method and a column for each tool."""
    tools = list(dict.fromkeys(each.tool for each in summaries))
    found = {(each.method, each.tool): each for each in summaries}
    lines = ["| method | " + " | ".join(tools) + " |", "|---" * (len(tools) + 1) + "|"]
    for method in dict.fromkeys(each.method for each in summaries):
        cells = [_cell(found.get((method, tool))) for tool in tools]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(summary: Summary | None) -> str:
    if summary is None:
        return "–"
    if summary.tool == COPY:
        return f"{summary.seconds:.2f} s"
    return f"{summary.seconds:.2f} s ({summary.ratio:.2f}×), {summary.peak_bytes / 1e6:,.0f} MB"
