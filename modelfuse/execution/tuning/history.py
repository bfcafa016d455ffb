"""Write the files beside the study: the best recipe, a table of all trials, and a plot of their numbers."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from modelfuse.checkpoints.output.failures import cannot_write
from modelfuse.execution.tuning.search_space import Dimension
from modelfuse.execution.tuning.trials import Trial
from modelfuse.recipe.files import dump_documents
from modelfuse.recipe.schema import as_json

BEST, TABLE, PICTURE, FRONT = "best.yaml", "trials.csv", "history.svg", "front"
#: Settings that are left out of recipe files.
ELSEWHERE = ("output_path", "overwrite")
#: The size and the margins of the plot, in pixels.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 80, 24, 40, 48
GREY, DARK, LIGHT = "#999999", "#1f4e79", "#7fa8d1"


def write_history(
    folder: Path,
    dimensions: Sequence[Dimension],
    directions: Mapping[str, bool],
    trials: Sequence[Trial],
    front: Sequence[Trial],
    recipes: Mapping[int, Mapping[str, object]],
) -> None:
    """Write the recipes, the table and the plot.

    Args:
        folder: The folder of the study.
        dimensions: The dimensions that were searched.
        directions: For each number of the evaluations, whether larger is better.
        trials: All evaluated trials.
        front: The best trial, or the Pareto front.
        recipes: The settings of each trial of the front, by the trial's number.

    Raises:
        OutputError: If a file cannot be written.
    """
    files = {
        BEST: recipe_text(recipes[front[0].number]),
        TABLE: _table(dimensions, directions, trials, front),
        PICTURE: picture(directions, trials, front),
    }
    if len(directions) > 1:
        files |= {f"{FRONT}/trial-{each.number}.yaml": recipe_text(recipes[each.number]) for each in front}
    for name, text in files.items():
        path = folder / name
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            raise cannot_write(error, path) from error


def recipe_text(settings: Mapping[str, object]) -> str:
    """Settings as the text of a YAML recipe or, if they have one, of a mergekit configuration."""
    text = settings.get("mergekit")
    if isinstance(text, str):
        return text
    return dump_documents([{name: _plain(each) for name, each in settings.items() if name not in ELSEWHERE}])


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else as_json(value)


def _table(
    dimensions: Sequence[Dimension], directions: Mapping[str, bool], trials: Sequence[Trial], front: Sequence[Trial]
) -> str:
    """The trials as CSV, one line each."""
    text, best = io.StringIO(), {each.number for each in front}
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["trial", *directions, "best", "merge_seconds", "evaluation_seconds", *(each.name for each in dimensions)]
    )
    for trial in trials:
        numbers = [trial.numbers[name] for name in directions]
        seconds = [f"{each:.3f}" for each in trial.seconds]
        values = [trial.parameters[each.name] for each in dimensions]
        writer.writerow([trial.number, *numbers, int(trial.number in best), *seconds, *values])
    return text.getvalue()


def picture(directions: Mapping[str, bool], trials: Sequence[Trial], front: Sequence[Trial]) -> str:
    """An SVG plot of one number over the trials, or of the first two numbers against each other with their front."""
    names = [*directions][:2]
    shown = [each for each in trials if all(math.isfinite(each.numbers[name]) for name in names)]
    if len(names) == 1:
        points = [(float(each.number), each.numbers[names[0]]) for each in shown]
        best, line = math.inf, []
        for trial, number in points:
            best = min(best, -number if directions[names[0]] else number)
            line.append((trial, -best if directions[names[0]] else best))
        marked = [(float(each.number), each.numbers[names[0]]) for each in front if each in shown]
        return _drawing("trial", names[0], "best so far", points, line, marked)
    points = [(each.numbers[names[0]], each.numbers[names[1]]) for each in shown]
    marked = sorted((each.numbers[names[0]], each.numbers[names[1]]) for each in front if each in shown)
    return _drawing(names[0], names[1], "front", points, marked, marked)


Points = Sequence[tuple[float, float]]


def _drawing(across: str, upward: str, line_name: str, points: Points, line: Points, marked: Points) -> str:
    """A scatter plot with a line, marked points, and axes that are labelled at their ends."""
    (left, right), (low, high) = (_ends([point[axis] for point in points]) for axis in (0, 1))

    def pixels(point: tuple[float, float]) -> tuple[float, float]:
        return (
            LEFT + (point[0] - left) / (right - left) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (point[1] - low) / (high - low) * (HEIGHT - TOP - BOTTOM),
        )

    bottom = HEIGHT - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke="{GREY}"/>',
        _text(LEFT, TOP - 16, f"{upward}; line: {line_name}", "start"),
        _text(LEFT - 8, bottom + 4, f"{low:.4g}", "end"),
        _text(LEFT - 8, TOP + 4, f"{high:.4g}", "end"),
        _text(LEFT, bottom + 20, f"{left:.4g}", "middle"),
        _text(WIDTH - RIGHT, bottom + 20, f"{right:.4g}", "end"),
        _text((LEFT + WIDTH - RIGHT) / 2, bottom + 36, across, "middle"),
    ]
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{LIGHT}"/>' for x, y in map(pixels, points)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(pixels, line))
    parts.append(f'<polyline points="{path}" fill="none" stroke="{DARK}" stroke-width="2"/>')
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{DARK}"/>' for x, y in map(pixels, marked)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _ends(numbers: Sequence[float]) -> tuple[float, float]:
    low, high = min(numbers, default=0.0), max(numbers, default=1.0)
    return (low, high) if low < high else (low - 0.5, high + 0.5)
