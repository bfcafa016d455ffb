"""The demo's tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from demo.evaluate import Score
from demo.recipes import EXPERTS

#: Heading, name in Score, whether more is better, how it is written.
COLUMNS = (
    ("code", "code", False, "{:.1f}"),
    ("prose", "prose", False, "{:.1f}"),
    ("arithmetic", "arithmetic", False, "{:.2f}"),
    ("mean", "average", False, "{:.1f}"),
    ("sums right", "sums", True, "{:.0%}"),
)
BAR = 14


def show_domains(scores: dict[str, Score], merged: Sequence[str]) -> None:
    """Base, experts and merges, the best of each column marked."""
    names = ["base", *EXPERTS, *merged]
    best = {mark: (max if more else min)(getattr(scores[name], mark) for name in names) for _, mark, more, _ in COLUMNS}
    table = Table(
        title="Three experts become one: perplexity on held-out text, and sums",
        caption="Less perplexity is better; its mean is geometric. Green: the best.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("model", no_wrap=True)
    for heading, *_ in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for name in names:
        cells = []
        for _, mark, _, form in COLUMNS:
            value = getattr(scores[name], mark)
            cells.append(Text(form.format(value), "bold green" if value == best[mark] else ""))
        table.add_row(f"{name} (expert)" if name in EXPERTS else name, *cells)
        if name in ("base", EXPERTS[-1]):
            table.add_section()
    Console().print(table)


def bar(share: float) -> str:
    """A bar of up to BAR signs, drawn to an eighth of one."""
    full, rest = divmod(round(share * BAR * 8), 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")


def show_path(title: str, scores: Sequence[Score]) -> None:
    """What each further part of alignment brings and costs."""
    table = Table(title=title, title_justify="left")
    table.add_column("aligned", justify="right")
    for heading in ("preference", "sums right"):
        table.add_column(heading, min_width=BAR, no_wrap=True)
        table.add_column("", justify="right")
    table.add_column("mean perpl.", justify="right")
    for at, score in enumerate(scores):
        table.add_row(
            f"{at / (len(scores) - 1):.3f}",
            Text(bar(score.preference), "cyan"),
            f"{score.preference:.0%}",
            Text(bar(score.sums), "magenta"),
            f"{score.sums:.0%}",
            f"{score.average:.1f}",
        )
    Console().print(table)
