"""Draw the demo's two pictures from its results: ``python -m demo.plot``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from demo.recipes import DOMAIN_MERGES, EXPERTS, STEPS, paths

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
Marks = dict[str, dict[str, float]]

INK, FAINT, GRID, PAPER = "#1f2328", "#6b7280", "#e5e7eb", "#ffffff"
BASE, EXPERT, MERGE, BEST_MARK = "#6b7280", "#d97706", "#2563eb", "#15803d"
PREFERENCE, SUMS, PERPLEXITY = "#2563eb", "#c2410c", "#7c3aed"
FONT = "ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"


class Picture:
    """An SVG, drawn from a few shapes."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height
        self.parts = [f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>']

    def text(self, x: float, y: float, words: str, *, size: int = 13, fill: str = INK, anchor: str = "start",
             bold: bool = False) -> None:  # fmt: skip
        """Words, their baseline at y."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight} '
            f'paint-order="stroke" stroke="{PAPER}" stroke-width="3" stroke-linejoin="round">'
            f"{escape(words)}</text>"
        )

    def line(self, points: Sequence[tuple[float, float]], color: str, *, width: float = 1, dash: str = "") -> None:
        """A line through points."""
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<polyline points="{places}" fill="none" stroke="{color}" stroke-width="{width}" '
            f'stroke-linejoin="round"{dashes}/>'
        )

    def dot(self, x: float, y: float, color: str, *, radius: float = 5) -> None:
        """A dot with a thin rim, so that neighbours stay apart."""
        self.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{color}" stroke="{PAPER}" stroke-width="1.5"/>'
        )

    def write(self, path: Path, title: str) -> None:
        """Save it; the title is what a screen reader says."""
        width, height = self.size
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="{FONT}" role="img" aria-label="{escape(title)}">'
        )
        path.write_text("\n".join([head, f"<title>{escape(title)}</title>", *self.parts, "</svg>"]) + "\n")


PANELS = (
    ("code", "code", False),
    ("prose", "prose", False),
    ("arithmetic", "arithmetic", False),
    ("average", "mean", False),
    ("sums", "sums right", True),
)
LEFT, TOP, ROW, PANEL, GAP = 190, 112, 25, 122, 22


def domains(marks: Marks) -> None:
    """A row a model, a panel a measure: where each model stands between the worst and the best."""
    merged = [merge.name for merge in DOMAIN_MERGES if merge.shown]
    rows = ["base", *EXPERTS, *merged]
    width = LEFT + len(PANELS) * (PANEL + GAP) + 10
    picture = Picture(width, TOP + ROW * len(rows) + 26)
    picture.text(20, 32, "Three experts become one model", size=18, bold=True)
    picture.text(20, 54, "Perplexity on held-out text, on a logarithmic scale (left is better), and the share of sums "
                         "answered right (right is better).", fill=FAINT)  # fmt: skip
    places: dict[str, float] = {name: TOP + ROW * at + (8 if at > len(EXPERTS) else 0) for at, name in enumerate(rows)}
    for name, y in places.items():
        words = f"{name} (expert)" if name in EXPERTS else name
        picture.text(LEFT - 14, y + 4, words, anchor="end", bold=name == "base")
    for at, panel in enumerate(PANELS):
        _panel(picture, LEFT + at * (PANEL + GAP), panel, marks, places)
    picture.write(DOCS / "demo-domains.svg", "Perplexity of base, experts and merges on each domain")


def _panel(picture: Picture, left: float, panel: tuple[str, str, bool], marks: Marks, places: dict[str, float]) -> None:
    mark, heading, more = panel
    values = {name: marks[name][mark] for name in places}
    low, high = (0.0, 1.0) if more else (min(values.values()), max(values.values()))
    best = (max if more else min)(values.values())

    def x(value: float) -> float:
        share = (value - low) / (high - low) if more else math.log(value / low) / math.log(high / low)
        return left + 8 + (PANEL - 16) * share

    bottom = max(places.values()) + 12
    picture.text(left + PANEL / 2, TOP - 32, heading, anchor="middle", bold=True)
    picture.line([(left, TOP - 18), (left + PANEL, TOP - 18)], GRID)
    picture.line([(x(values["base"]), TOP - 14), (x(values["base"]), bottom)], BASE, dash="3 3")
    for name, y in places.items():
        value = values[name]
        picture.line([(left, y), (left + PANEL, y)], GRID, width=0.6)
        color = BASE if name == "base" else EXPERT if name in EXPERTS else MERGE
        words = f"{value:.0%}" if more else f"{value:.2f}" if value < 10 else f"{value:.1f}"
        right = x(value) < left + PANEL * 0.6
        picture.dot(x(value), y, BEST_MARK if value == best else color, radius=6 if value == best else 5)
        picture.text(x(value) + (10 if right else -10), y + 4, words, size=11, bold=value == best,
                     fill=BEST_MARK if value == best else FAINT, anchor="start" if right else "end")  # fmt: skip


CURVES = (("preference", "preference", PREFERENCE), ("sums", "sums right", SUMS))
CHART_TOP, CHART_WIDE, SHARES_HIGH, PERPLEXITY_TOP, PERPLEXITY_HIGH = 112, 340, 200, 352, 90


def alignment(marks: Marks) -> None:
    """Two charts: the base turning into the aligned model, and the experts' merge taking alignment in."""
    picture = Picture(920, 510)
    picture.text(20, 32, "Winning back what alignment cost", size=18, bold=True)
    words = "The preference is learnt early on the way, the damage comes late: a merge takes one without the other."
    picture.text(20, 54, words, fill=FAINT)
    for at, (_, words, color) in enumerate((*CURVES, ("", "mean perplexity", PERPLEXITY))):
        picture.dot(500 + 128 * at, 27, color)
        picture.text(512 + 128 * at, 32, words, fill=color, bold=True)
    series = {title: [marks[name] for name in names] for title, names in paths().items()}
    values = [point["average"] for points in series.values() for point in points]
    for left, (title, points) in zip((70, 530), series.items(), strict=True):
        picture.text(left, CHART_TOP - 18, title, bold=True, size=14)
        _shares(picture, left, points)
        _perplexities(picture, left, [point["average"] for point in points], (min(values), max(values)))
    picture.write(DOCS / "demo-alignment.svg", "Preference, sums and perplexity as alignment is merged in")


def _shares(picture: Picture, left: float, points: list[dict[str, float]]) -> None:
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = CHART_TOP + SHARES_HIGH * (1 - share)
        picture.line([(left, y), (left + CHART_WIDE, y)], GRID)
        picture.text(left - 10, y + 4, f"{share:.0%}", size=11, fill=FAINT, anchor="end")
    for mark, _, color in CURVES:
        _curve(picture, left, [CHART_TOP + SHARES_HIGH * (1 - point[mark]) for point in points], color)


def _perplexities(picture: Picture, left: float, values: list[float], ends: tuple[float, float]) -> None:
    low, high = 10.0, max(100.0, ends[1])

    def y(value: float) -> float:
        return PERPLEXITY_TOP + PERPLEXITY_HIGH * math.log(high / value) / math.log(high / low)

    for tick in (10, 30, 100):
        picture.line([(left, y(tick)), (left + CHART_WIDE, y(tick))], GRID)
        picture.text(left - 10, y(tick) + 4, f"{tick}", size=11, fill=FAINT, anchor="end")
    _curve(picture, left, [y(value) for value in values], PERPLEXITY)
    bottom = PERPLEXITY_TOP + PERPLEXITY_HIGH
    for at in range(0, STEPS + 1, 2):
        x = left + CHART_WIDE * at / STEPS
        picture.text(x, bottom + 20, f"{at / STEPS:g}", size=11, fill=FAINT, anchor="middle")
    picture.text(left + CHART_WIDE / 2, bottom + 42, "weight of the aligned model", fill=FAINT, anchor="middle")


def _curve(picture: Picture, left: float, heights: list[float], color: str) -> None:
    line = [(left + CHART_WIDE * at / STEPS, y) for at, y in enumerate(heights)]
    picture.line(line, color, width=2.5)
    for x, y in line:
        picture.dot(x, y, color, radius=4.5)


def main() -> None:
    """Draw both."""
    marks: Marks = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    DOCS.mkdir(exist_ok=True)
    domains(marks)
    alignment(marks)


if __name__ == "__main__":
    main()
