"""Draw the README's chart from its table: ``python -m benchmarks.chart``."""

from __future__ import annotations

import re
from pathlib import Path

from demo.plot import FAINT, INK, MERGE, Picture

ROOT = Path(__file__).parent.parent
#: The columns of the table that are drawn, with their labels and colours.
BARS = ((1, "a plain copy of the same bytes", FAINT), (2, "modelfuse", MERGE),
        (7, "arcee's mergekit", "#d97706"), (8, "PaddleFormers", "#b45309"))  # fmt: skip
METHODS = ("linear", "dare_ties", "ties", "della")
WIDTH, LEFT, ROW, GAP = 920, 120, 17, 18


def rows() -> dict[str, list[float]]:
    """The seconds of each method in METHODS, in the order of BARS."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    cells = {line.split("|")[1].split("`")[1]: line.split("|") for line in text.splitlines() if line.startswith("| `")}
    return {name: [_seconds(cells[name][column + 1]) for column, _, _ in BARS] for name in METHODS}


def _seconds(cell: str) -> float:
    found = re.search(r"[\d.]+", cell)
    assert found is not None
    return float(found[0])


def draw(path: Path) -> None:
    """Write the chart as SVG."""
    drawn = rows()
    picture = Picture(WIDTH, 96 + len(drawn) * (len(BARS) * ROW + GAP))
    scale = (WIDTH - LEFT - 90) / max(map(max, drawn.values()))
    picture.text(20, 32, "Merging three fine-tunes and their base, 714 MB each, in seconds", size=18, bold=True)
    at = 20.0
    for _, name, color in BARS:
        picture.parts.append(f'<rect x="{at}" y="47" width="12" height="12" rx="2" fill="{color}"/>')
        picture.text(at + 18, 58, name, fill=FAINT)
        at += 40 + 7.2 * len(name)
    top = 84.0
    for method, seconds in drawn.items():
        picture.text(LEFT - 12, top + ROW * 2 + 4, method, anchor="end", bold=True)
        for (_, _, color), value in zip(BARS, seconds, strict=True):
            length = max(value * scale, 2)
            picture.parts.append(
                f'<rect x="{LEFT}" y="{top + 1:.1f}" width="{length:.1f}" height="{ROW - 3}" rx="2" fill="{color}"/>'
            )
            picture.text(LEFT + length + 8, top + ROW - 5, f"{value:g} s", size=12, fill=INK)
            top += ROW
        top += GAP
    picture.write(path, "Seconds of a copy, modelfuse, arcee's mergekit and PaddleFormers for four methods")


if __name__ == "__main__":
    draw(ROOT / "docs" / "speed.svg")
