"""Draw SVG and PNG images, without a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelfuse.errors import RecipeError
from modelfuse.inspection.diff_result import Diff, TensorGroup
from modelfuse.inspection.merge_report import MergeReport
from modelfuse.inspection.pictures.drawn_result import DrawnResult
from modelfuse.inspection.pictures.library import check_installed
from modelfuse.inspection.pictures.measures import MEASURES, OUTCOMES, Measure, Number
from modelfuse.inspection.pictures.picture_files import check_replaceable, marked_png, replace_file
from modelfuse.inspection.pictures.specs import CONFIG, FONT, NOTHING, ROW, Spec, map_spec, matrix_spec
from modelfuse.version import __version__

#: Suffixes of image files.
ENDINGS = (".svg", ".png")
#: Colours of text and background; the width of a map in pixels.
INK, PAPER, WIDTH = "#1d2127", "#ffffff", 720
#: Pixels of a PNG per pixel of the image.
SCALE = 2.0
#: The most maps in an image.
MOST_MAPS = 12
OUTSIDE = "–"


def check_image(path: Path, measure: str | None, overwrite: bool = False, of_merge: bool = False) -> Measure:
    """Check the arguments of an image, before any work is done.

    Args:
        path: The file.
        measure: The measure to draw; None: the first.
        overwrite: Whether to replace a file that modelfuse has not written.
        of_merge: Whether the result is that of a merge.

    Raises:
        MissingExtraError: If the extra is not installed.
        RecipeError: If the suffix or the measure is unknown.
        OutputError: If there is a file that modelfuse has not written.
    """
    if path.suffix.lower() not in ENDINGS:
        raise RecipeError(f"{path} is no name of an image", f"It should end with {' or '.join(ENDINGS)}.")
    known = {**OUTCOMES, **MEASURES} if of_merge else MEASURES
    if measure is not None and measure not in known:
        raise RecipeError(f"There is no measure {measure!r}", f"There are {', '.join(known)}.")
    check_replaceable(path, overwrite)
    check_installed()
    return known[measure] if measure is not None else next(iter(known.values()))


def write_image(found: Diff | MergeReport, path: Path, measure: str | None = None, overwrite: bool = False) -> None:
    """Draw one map of layers × modules per model, and all pairs of models below.

    Args:
        found: The result of diff or report.
        path: The file, .svg or .png.
        measure: A key of ``MEASURES`` or, for a merge, of ``OUTCOMES``; None: the first.
        overwrite: Whether to replace a file that modelfuse has not written.

    Raises:
        MissingExtraError: If the extra is not installed.
        RecipeError: If the suffix or the measure is unknown.
        OutputError: If there is a file that modelfuse has not written.
    """
    shown = DrawnResult.of(found)
    chosen = check_image(path, measure, overwrite, shown.report is not None)
    import vl_convert

    spec = json.dumps(image_spec(shown, chosen))
    if path.suffix.lower() == ".png":
        content = marked_png(vl_convert.vegalite_to_png(spec, scale=SCALE))
    else:
        svg: str = vl_convert.vegalite_to_svg(spec)
        content = re.sub(r"(?=<svg )", f"<!-- modelfuse {__version__} -->", svg, count=1).encode()
    replace_file(path, content, overwrite)


def image_spec(shown: DrawnResult, measure: Measure) -> Spec:
    """The Vega-Lite specification of an image, with data."""
    found, names = shown.diff, shown.names
    values = shown.values(measure, "cells")
    series = [(label, column) for label, column in _series(names, found, measure)
              if any(row[column] is not None for row in values)][:MOST_MAPS]  # fmt: skip
    domain = _domain([row[column] for row in values for _, column in series], measure)
    maps = [_map(found.cells, label, [row[column] for row in values], measure, domain) for label, column in series]
    if maps:
        maps[0]["encoding"]["color"]["legend"] = {**maps[0]["encoding"]["color"]["legend"], **_axis(measure)}
    for each in maps[1:]:
        each["encoding"]["color"]["legend"] = None
    pictures: list[Spec] = [*maps]
    if len(names) > 1 and (pairs := _matrix(names, found, measure)) is not None:
        pictures.append(pairs)
    config = json.loads(json.dumps(CONFIG).replace("currentColor", INK))
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "config": {**config, "background": PAPER, "font": FONT},
        "spacing": 14,
        "vconcat": pictures,
        "resolve": {"scale": {"color": "independent", "x": "independent", "y": "independent"}},
    }


def _series(names: Sequence[str], found: Diff, measure: Measure) -> list[tuple[str, int]]:
    """The label of each map, and the index of its model or pair among the measure's values."""
    if measure.of == "model":
        return [(name, number) for number, name in enumerate(names)]
    pairs = [(each.model, each.other) for each in found.whole.pairs]
    mark = "←" if measure.of == "order" else "·"
    return [
        (f"{names[model]} {mark} {names[other]}", number)
        for number, (model, other) in enumerate(pairs)
        if measure.of == "order" or model < other
    ]


def _map(
    cells: Sequence[TensorGroup], label: str, values: Sequence[Number], measure: Measure, domain: list[float]
) -> Spec:
    spec = map_spec()
    rows = [
        {"column": column_of(each), "module": each.module, "value": value}
        for each, value in zip(cells, values, strict=True)
    ]
    columns = list(dict.fromkeys(row["column"] for row in rows))
    order = [each for each in columns if each == OUTSIDE] + [each for each in columns if each != OUTSIDE]
    spec["encoding"].pop("tooltip")
    spec["encoding"]["x"]["sort"] = order
    spec["encoding"]["color"] |= {"scale": {"scheme": measure.scheme, "domain": domain}, "title": measure.title}
    spec["encoding"]["color"]["condition"]["value"] = NOTHING
    return {**spec, "title": label, "width": WIDTH, "height": {"step": ROW}, "data": {"values": rows}}


def _matrix(names: Sequence[str], found: Diff, measure: Measure) -> Spec | None:
    """The table of all pairs: of the measure or, if it is one of single models, of interference or else cosine."""
    wanted = [measure.key] if measure.of != "model" else ["interference", "cosine"]
    for key in wanted:
        shown = MEASURES[key]
        values = shown.values(found.whole)
        if any(value is not None for value in values):
            break
    else:
        return None
    domain = _domain(values, shown)
    rows: list[dict[str, Any]] = []
    for pair, value in zip(found.whole.pairs, values, strict=True):
        share = 0.0 if value is None else (value - domain[0]) / (domain[1] - domain[0])
        bright = value is not None and (share > 0.6 if shown.middle is None else abs(share - 0.5) < 0.3)
        rows.append({"model": names[pair.model], "other": names[pair.other], "value": value,
                     "text": "" if value is None else f"{value:.2g}", "bright": bright})  # fmt: skip
    spec = matrix_spec()
    spec["layer"][0]["encoding"].pop("tooltip")
    spec["layer"][0]["encoding"]["color"]["scale"] = {"scheme": shown.scheme, "domain": domain}
    spec["encoding"]["x"] |= {"scale": {"domain": [*names]}, "title": "disturbed by" if shown.of == "order" else None}
    spec["encoding"]["y"] |= {"scale": {"domain": [*names]}}
    return {**spec, "title": shown.title, "width": {"step": 52}, "height": {"step": 28}, "data": {"values": rows}}


def column_of(group: TensorGroup) -> str:
    """The name of a group's layer."""
    if group.layer is None:
        return OUTSIDE
    return f"{group.stack} {group.layer}" if group.stack else str(group.layer)


def _domain(values: Sequence[Number], measure: Measure) -> list[float]:
    """The smallest and the largest value of the colour scale."""
    there = [value for value in values if value is not None]
    if not there:
        return [0.0, 1.0]
    if measure.middle is not None:
        far = max(abs(value - measure.middle) for value in there) or 1.0
        return [measure.middle - far, measure.middle + far]
    low, high = min(0.0, *there), max(there)
    return [low, high if high > low else low + 1.0]


def _axis(measure: Measure) -> dict[str, object]:
    return {"format": ".3~p" if measure.percent else ".3~g"}
