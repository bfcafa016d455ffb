"""Print the results, and write the tables of ``docs/quality.md`` and the chart ``docs/quality.svg``.

``python -m benchmarks.quality.report`` writes them from ``docs/quality.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from demo.plot import BASE, FAINT, GRID, MERGE, Picture

from .merges import PLAIN
from .regimes import REGIMES, Regime
from .scores import Score

DOCS = Path(__file__).parents[2] / "docs"
RESULTS, PAGE, PICTURE = DOCS / "quality.json", DOCS / "quality.md", DOCS / "quality.svg"
HEADINGS = (
    "method",
    "share",
    "− task_arithmetic [95 %]",
    "accuracy",
    "worst task",
    "forgotten",
    "‖m‖/‖Στ‖",
    "no λ given",
)

#: Sizes of the chart in pixels.
LEFT, TOP, ROW, PANEL, GAP = 190, 108, 21, 210, 34
LEAST = -0.1  # The left end of the axis; smaller shares are drawn there.
COLORS = {True: MERGE, False: "#9ca3af"}


def cells(score: Score) -> list[str]:
    """The cells of a row of the tables."""
    sure = f"{score.difference:+.3f} [{score.low:+.3f}, {score.high:+.3f}]" if score.label != PLAIN else "0"
    norm = "–" if score.norm is None else f"{score.norm:.2f}"
    return [score.label, f"{score.share:.3f}", sure, f"{score.accuracy:.3f}", f"{score.worst:.2f}",
            f"{score.forgotten:+.2f}", norm, f"{score.usual:.3f}"]  # fmt: skip


def show(regime: Regime, own: Sequence[Score]) -> None:
    """Print a table."""
    table = Table(title=f"{regime.name}: {regime.title}", title_justify="left")
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if number else "left")
    for score in own:
        table.add_row(*cells(score), style="bold" if score.label == PLAIN else "")
    Console(width=130).print(table)


def saved() -> dict[str, list[Score]]:
    """The results in ``docs/quality.json``."""
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    return {
        name: [Score(**{**each, "by_seed": tuple(each["by_seed"])}) for each in own] for name, own in content.items()
    }


def write_pages() -> None:
    """Update the tables of the page, and draw the chart."""
    results = saved()
    text = PAGE.read_text(encoding="utf-8")
    for name, own in results.items():
        lines = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "--:|" * (len(HEADINGS) - 1)]
        for score in own:
            row = cells(score)
            row[0] = f"**{row[0]}**" if score.label == PLAIN else row[0]
            lines.append("| " + " | ".join(row) + " |")
        text = _between(text, f"<!-- table: {name} -->\n", "<!-- end -->", "\n".join([*lines, ""]))
    PAGE.write_text(text, encoding="utf-8")
    draw(results)


def _between(text: str, start: str, end: str, content: str) -> str:
    """Replace the text between two markers."""
    before, rest = text.split(start, 1)
    return before + start + content + end + rest.split(end, 1)[1]


def draw(results: Mapping[str, Sequence[Score]]) -> None:
    """A chart with a row for each method and a panel for each regime: the share, its interval, and with default λ."""
    order = sorted(
        {each.label for own in results.values() for each in own}, key=lambda label: (-_mean(results, label), label)
    )
    picture = Picture(LEFT + len(results) * (PANEL + GAP) + 10, TOP + ROW * len(order) + 40)
    picture.text(20, 32, "How much of what experts learnt a merge keeps", size=18, bold=True)
    picture.text(20, 54, "Share of the experts' gain over the base: λ chosen (dots; blue: surely above task "
                         "arithmetic) or not given (rings)", fill=FAINT)  # fmt: skip
    for at, label in enumerate(order):
        picture.text(LEFT - 14, TOP + ROW * at + 4, label, anchor="end", bold=label == PLAIN)
    for number, regime in enumerate(each for each in REGIMES if each.name in results):
        own = {each.label: each for each in results[regime.name]}
        _panel(picture, LEFT + number * (PANEL + GAP), regime, own, order)
    picture.write(PICTURE, "The share of the experts' gain that each method keeps, in three regimes")


def _panel(picture: Picture, left: float, regime: Regime, own: Mapping[str, Score], order: Sequence[str]) -> None:
    def x_of(share: float) -> float:
        return left + PANEL * (min(max(share, LEAST), 1) - LEAST) / (1 - LEAST)

    bottom = TOP + ROW * (len(order) - 1) + 10
    picture.text(left, TOP - 30, regime.name, bold=True)
    for share in (0, 0.25, 0.5, 0.75, 1):
        picture.line([(x_of(share), TOP - 12), (x_of(share), bottom)], GRID)
        picture.text(x_of(share), bottom + 18, f"{share:g}", size=11, fill=FAINT, anchor="middle")
    plain = own[PLAIN].share
    picture.line([(x_of(plain), TOP - 12), (x_of(plain), bottom)], BASE, dash="4 3")
    for at, label in enumerate(order):
        if label not in own:
            continue
        score, y = own[label], TOP + ROW * at
        color = COLORS[score.low > 0]
        if label != PLAIN:
            picture.line([(x_of(plain + score.low), y), (x_of(plain + score.high), y)], color, width=3)
        picture.parts.append(
            f'<circle cx="{x_of(score.usual):.1f}" cy="{y}" r="3.5" fill="none" stroke="{color}" stroke-width="1.5"/>'
        )
        picture.dot(x_of(score.share), y, color)


def _mean(results: Mapping[str, Sequence[Score]], label: str) -> float:
    found = [each.share for own in results.values() for each in own if each.label == label]
    return sum(found) / len(found)


if __name__ == "__main__":
    write_pages()
