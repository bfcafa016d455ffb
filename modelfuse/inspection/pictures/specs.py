"""Vega-Lite specifications without data, for pages and images.

Text and axes take the colour of the surrounding text, as a page can be light or dark.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Spec = dict[str, Any]
#: The left, right, lower and upper edge of a rectangle.
Box = tuple[float, float, float, float]

TEXT = "currentColor"
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', 'Liberation Sans', sans-serif"
#: The colour of missing values, on light and dark.
NOTHING = "#88888833"
#: Heights of a row of a map and of a chart, in pixels; the colour scheme of models.
ROW, CHART, SERIES = 15, 260, "tableau20"
#: The mean width of a letter of a label, in pixels.
LETTER = 6.8
CONFIG: Spec = {
    "background": None,
    "font": FONT,
    "view": {"stroke": None},
    "axis": {"labelColor": TEXT, "titleColor": TEXT, "tickColor": TEXT, "domainColor": TEXT, "gridColor": "#88888844",
             "titleFontWeight": "normal", "labelFontSize": 11, "titleFontSize": 12},
    "legend": {"labelColor": TEXT, "titleColor": TEXT, "titleFontWeight": "normal", "labelLimit": 260,
               "titleLimit": 320},
    "title": {"color": TEXT, "subtitleColor": TEXT, "anchor": "start", "fontSize": 13, "fontWeight": 600},
}  # fmt: skip


def _tip(field: str, title: str, **more: object) -> Spec:
    return {"field": field, "title": title, **more}


def map_spec() -> Spec:
    """Map of layers × modules of a model or pair: rows ``column``, ``module``, ``value``, ``series``, ``norm``."""
    return {
        "mark": {"type": "rect", "invalid": None},
        "encoding": {
            "x": {"field": "column", "type": "ordinal", "sort": None, "title": "layer",
                  "axis": {"labelAngle": 0, "labelOverlap": True, "domain": False, "ticks": False}},
            "y": {"field": "module", "type": "ordinal", "sort": None, "title": None,
                  "axis": {"labelLimit": 200, "domain": False, "ticks": False}},
            "color": {"condition": {"test": "datum.value === null", "value": NOTHING}, "field": "value",
                      "type": "quantitative", "legend": {"gradientLength": 220, "orient": "top", "direction":
                                                         "horizontal"}},
            "tooltip": [_tip("series", "model"), _tip("column", "layer"), _tip("module", "module"),
                        _tip("shown", "value"), _tip("elements", "elements", format=","), _tip("more", "tensors")],
        },
    }  # fmt: skip


def lines_spec() -> Spec:
    """Lines of a measure by layer: rows ``column``, ``value``, ``series``."""
    return {
        "height": CHART,
        "mark": {"type": "line", "point": {"size": 18}, "strokeWidth": 1.6},
        "encoding": {
            "x": {"field": "column", "type": "ordinal", "sort": None, "title": "layer",
                  "axis": {"labelAngle": 0, "labelOverlap": True}},
            "y": {"field": "value", "type": "quantitative", "scale": {"zero": False, "nice": True}},
            "color": {"field": "series", "type": "nominal", "sort": None, "title": None,
                      "scale": {"scheme": SERIES}, "legend": {"orient": "top", "columns": 6}},
            "opacity": {"condition": {"param": "chosen", "empty": True, "value": 1}, "value": 0.15},
            "tooltip": [_tip("series", "model"), _tip("column", "layer"), _tip("shown", "value")],
        },
        "params": [{"name": "chosen", "select": {"type": "point", "fields": ["series"]}, "bind": "legend"}],
    }  # fmt: skip


def matrix_spec() -> Spec:
    """Table of all ordered pairs of models: rows ``model``, ``other``, ``value``, ``shown``."""
    place = {
        "x": {"field": "other", "type": "ordinal", "sort": None, "title": "disturbed by",
              "axis": {"orient": "top", "labelAngle": -30, "labelLimit": 160, "domain": False, "ticks": False}},
        "y": {"field": "model", "type": "ordinal", "sort": None, "title": None,
              "axis": {"labelLimit": 200, "domain": False, "ticks": False}},
    }  # fmt: skip
    color = {"condition": {"test": "datum.value === null", "value": NOTHING}, "field": "value",
             "type": "quantitative", "legend": None}  # fmt: skip
    tips = [_tip("model", "model"), _tip("other", "other"), _tip("shown", "value"), _tip("error", "standard error")]
    return {
        "encoding": place,
        "layer": [
            {"mark": {"type": "rect", "cursor": "pointer"}, "encoding": {"color": color, "tooltip": tips}},
            {"mark": {"type": "text", "fontSize": 11, "tooltip": False},
             "encoding": {"text": {"field": "text"},
                          "color": {"condition": {"test": "datum.bright", "value": "#111"}, "value": "#fff"}}},
        ],
    }  # fmt: skip


def kept_spec() -> Spec:
    """Share of ‖τ‖² that trim keeps: rows ``density``, ``value``, ``series``. The diagonal is what dare keeps."""
    shares = {"format": ".0%"}
    return {
        "height": CHART,
        "layer": [
            {"data": {"values": [{"x": each / 50, "y": each / 50} for each in (0.5, *range(1, 51))]},
             "mark": {"type": "line", "strokeDash": [4, 4], "color": TEXT, "opacity": 0.5},
             "encoding": {"x": {"field": "x", "type": "quantitative"}, "y": {"field": "y", "type": "quantitative"}}},
            {"mark": {"type": "line", "point": {"size": 22}},
             "encoding": {
                 "x": {"field": "density", "type": "quantitative", "scale": {"type": "log", "domain": [0.01, 1]},
                       "title": "density: share of the elements kept", "axis": {**shares, "values": [
                           0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]}},
                 "y": {"field": "value", "type": "quantitative", "scale": {"domain": [0, 1]},
                       "title": "share of ‖τ‖² kept", "axis": shares},
                 "color": {"field": "series", "type": "nominal", "sort": None, "title": None,
                           "scale": {"scheme": SERIES}, "legend": {"orient": "top", "columns": 6}},
                 "tooltip": [_tip("series", "model"), _tip("density", "density", format=".0%"),
                             _tip("value", "kept", format=".1%")]}},
        ],
    }  # fmt: skip


def places_spec(places: Mapping[str, Any], width: int = 440, height: int = CHART) -> Spec:
    """The models and the base as points; both axes have the same scale."""
    (x, y), (wide, high) = places["center"], places["span"]
    unit = max(wide / width, high / height) or 1.0
    axis = {"axis": None, "type": "quantitative"}
    points = [((each["x"] - x) / unit, (each["y"] - y) / unit, each["name"]) for each in places["points"]]
    labels = [{"x": x + unit * across, "y": y + unit * up, "name": name} for across, up, name in
              _labels(points, width / 2, height / 2)]  # fmt: skip
    return {
        "width": width,
        "height": height,
        "data": {"values": places["points"]},
        "encoding": {
            "x": {"field": "x", **axis, "scale": {"domain": [x - unit * width / 2, x + unit * width / 2]}},
            "y": {"field": "y", **axis, "scale": {"domain": [y - unit * height / 2, y + unit * height / 2]}},
        },
        "layer": [
            {"mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
             "encoding": {"color": {"field": "kind", "type": "nominal", "legend": None,
                                    "scale": {"domain": ["model", "base", "output"],
                                              "range": ["#4c78a8", "#888888", "#f58518"]}},
                          "tooltip": [_tip("name", "model")]}},
            {"data": {"values": labels},
             "mark": {"type": "text", "baseline": "middle", "fontSize": 12, "color": TEXT, "tooltip": False},
             "encoding": {"text": {"field": "name"}}},
        ],
    }  # fmt: skip


def _labels(points: Sequence[tuple[float, float, str]], right: float, top: float) -> Iterator[tuple[float, float, str]]:
    """Centres of labels beside points; points whose label would overlap others have none.

    Args:
        points: x, y (upwards) and label, in pixels from the centre of the chart.
        right: The right edge of the chart.
        top: The upper edge.
    """
    taken = [(x - 6, x + 6, y - 6, y + 6) for x, y, _ in points]
    for x, y, name in reversed(points):  # The base and the output are last.
        half = len(name) * LETTER / 2
        for across, up in ((0, 14), (0, -14), (half + 9, 0), (-half - 9, 0)):
            box = (x + across - half, x + across + half, y + up - 7, y + up + 7)
            inside = -right <= box[0] and box[1] <= right and -top <= box[2] and box[3] <= top
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                yield x + across, y + up, name
                break


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]


def templates() -> Mapping[str, Spec]:
    """All specifications by name."""
    return {"map": map_spec(), "lines": lines_spec(), "matrix": matrix_spec(), "kept": kept_spec(), "config": CONFIG}
