"""Write a self-contained page: data, charts and scripts in one file, which works offline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from modelfuse.inspection.diff_names import short_names
from modelfuse.inspection.diff_result import DENSITIES, Diff, Suggestion
from modelfuse.inspection.merge_report import MergeReport
from modelfuse.inspection.pictures.drawn_result import DrawnResult
from modelfuse.inspection.pictures.library import library
from modelfuse.inspection.pictures.page_data import page_data
from modelfuse.inspection.pictures.picture_files import replace_file
from modelfuse.inspection.pictures.specs import templates
from modelfuse.printable import printable
from modelfuse.recipe.names import SETTINGS
from modelfuse.recipe.sizes import size
from modelfuse.version import __version__

#: The most entries of a list.
MOST_LISTED = 200
#: How to get a page of all elements instead of a sample.
MEASURED = "modelfuse report OUTPUT --html FILE measures all elements."
#: Content security policy: the page loads nothing, whatever names and paths contain.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


def write_page(found: Diff | MergeReport, path: Path, overwrite: bool = False) -> None:
    """Write the page of a result.

    Args:
        found: The result of diff or report.
        path: The file.
        overwrite: Whether to replace a file that modelfuse has not written.

    Raises:
        MissingExtraError: If the extra is not installed.
        OutputError: If there is a file that modelfuse has not written.
    """
    replace_file(path, page(found).encode(), overwrite)


def page(found: Diff | MergeReport) -> str:
    """The page as HTML."""
    shown = DrawnResult.of(found)
    diff = shown.diff
    return _template("page.html").substitute(
        title=escape(title_of(shown)),
        policy=POLICY,
        version=__version__,
        style=_resource("page.css"),
        subtitle=_subtitle(shown),
        findings=_listed((found if isinstance(found, MergeReport) else diff).findings, "findings"),
        advice=_advice((found if isinstance(found, MergeReport) else diff).advice),
        recipe="" if shown.report is None else _recipe(shown.report),
        beside=_beside(shown),
        method=_method(shown),
        data=as_script(page_data(shown)),
        specs=as_script(templates()),
        library=library(),
        behaviour=_resource("page.js"),
    )


def title_of(shown: DrawnResult) -> str:
    """The title."""
    names = shown.names
    if shown.report is not None:
        return f"{short_names([shown.report.output])[0]}: what the merge kept of {', '.join(names[:-1])}"
    if len(names) == 1:
        return f"{names[0]} and {shown.base}: what differs"
    return f"{len(names)} models and {shown.base}: what differs"


def as_script(value: object) -> str:
    r"""Encode as JSON without characters that are special in HTML, so that no text in it ends the script element.

    >>> as_script("</script>")
    '"\\u003c/script\\u003e"'
    """
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _resource(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _template(name: str) -> Template:
    return Template(_resource(name))


def _subtitle(shown: DrawnResult) -> str:
    found = shown.diff
    kind = "base" if found.base_given else "compared with"
    models = found.models if shown.report is None else found.models[:-1]
    lines = [f"{kind}: {found.base}", *(f"model {number}: {path}" for number, path in enumerate(models, 1))]
    if shown.report is not None:
        lines.append(f"output: {shown.report.output}")
    lines.append(f"{len(found.tensors)} tensors, {found.whole.elements:,} elements; {size(found.bytes_read)} read")
    return "<br>".join(escape(printable(line)) for line in lines)


def _listed(texts: Sequence[str], kind: str = "") -> str:
    if not texts:
        return ""
    items = "".join(f"<li>{escape(printable(text))}</li>" for text in texts)
    return f'<ul class="{kind}">{items}</ul>'


def _advice(advice: Sequence[Suggestion]) -> str:
    """Settings that are worth trying, with the reasons."""
    items = "".join(
        f"<li>{escape(printable(each.text))}<br><code>{escape(printable(each.flags))}</code></li>" for each in advice
    )
    return f'<section><h2>Worth trying</h2><ul class="findings">{items}</ul></section>' if items else ""


def _recipe(report: MergeReport) -> str:
    """The recipe, and suspicious tensors of the inputs."""
    stood_out = [
        text
        for each in report.suspicious
        for text in (
            *(f"{each.model}: {name} equals the base's" for name in each.equal),
            *(f"{each.model}: {name} is far from the base's" for name in each.far),
        )
    ]
    found = f"<section><h2>Suspicious tensors</h2>{_cut(stood_out)}</section>" if stood_out else ""
    return f"{found}<section><h2>Recipe</h2>{_settings_of(report.settings)}</section>"


def _settings_of(settings: Mapping[str, object]) -> str:
    """Settings that differ from their defaults, and the others, folded."""
    defaults = {name: setting.default for name, setting in SETTINGS.items()}
    own = {name: value for name, value in settings.items() if name not in defaults or value != defaults[name]}
    rest = {name: value for name, value in settings.items() if name not in own}
    others = f"<details><summary>{len(rest)} settings with default values</summary>{_settings(rest)}</details>"
    return _settings(own) + (others if rest else "")


def _settings(settings: Mapping[str, object]) -> str:
    rows = "".join(
        f'<tr><td class="text">{escape(name)}</td><td class="text name">{escape(printable(_plain(value)))}</td></tr>'
        for name, value in settings.items()
    )
    return f'<div class="scroll"><table>{rows}</table></div>'


def _plain(value: object) -> str:
    if isinstance(value, list) and all(isinstance(each, str | int | float) for each in value):
        return ", ".join(f"{each:g}" if isinstance(each, float) else str(each) for each in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _cut(texts: Sequence[str]) -> str:
    """A list; of a long one, its beginning."""
    left = len(texts) - MOST_LISTED
    return _listed(texts[:MOST_LISTED]) + (f'<p class="soft">and {left} more</p>' if left > 0 else "")


def _beside(shown: DrawnResult) -> str:
    """Differences of other files, and tensors that were not compared."""
    found, names = shown.diff, shown.names
    beside = [f"{names[each.model]}: {each.text}" for each in found.side_differences]
    absent = [f"{each.tensor}: {each.because}" for each in found.not_compared]
    parts = []
    for title, texts in (("Beside the weights", beside), ("Not compared", absent)):
        if texts:
            parts.append(f"<section><h2>{title}</h2>{_cut(texts)}</section>")
    return "".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _method(shown: DrawnResult) -> str:
    found = shown.diff
    elements, parts = "all elements", ["τ is the difference of a model to the base, ‖·‖ the Frobenius norm."]
    sample = None if shown.report is None else shown.report.sample
    if any(each.interference is not None for each in found.whole.pairs):
        how = "computed exactly" if found.exact else "estimated; the tooltips of pairs have the standard error"
        parts.append(f"Interference is {how}.")
    elif len(shown.names) > 1:
        how = "no matrix of a layer was compared" if sample is None else "the sample has too few rows of matrices"
        parts.append(f"There is no interference: {how}." + (sample is not None) * f" {MEASURED}")
    if sample is not None and sample.share < 1:
        elements = (
            f"a sample, {_percent(sample.share)} of the elements. The standard error of ‖τ‖ is "
            f"{_percent(sample.model_error)} for all tensors together, and {_percent(sample.tensor_error)} for one of "
            f"them (median). {MEASURED}"
        )
        return escape(" ".join((*parts, f"Numbers are estimates from {elements}")))
    parts.append(f"What trim keeps is told for the densities {', '.join(f'{each:g}' for each in DENSITIES)}.")
    parts.append(f"Numbers are float64 sums over {elements}.")
    return escape(" ".join(parts))
