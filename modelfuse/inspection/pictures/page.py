"""One self-contained page: data, pictures and behaviour in a single file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from modelfuse.errors import MissingExtraError
from modelfuse.inspection.diff_result import DENSITIES, Diff
from modelfuse.inspection.pictures.page_data import labels, page_data
from modelfuse.inspection.pictures.picture_files import replace_file
from modelfuse.inspection.pictures.specs import templates
from modelfuse.printable import printable
from modelfuse.recipe.sizes import size
from modelfuse.version import __version__

MISSING = ("Pages and pictures need Vega-Lite, which is not installed", "pip install 'modelfuse[report]'")
#: Nothing is fetched, whatever the text of strangers says.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


def library() -> str:
    """Vega, Vega-Lite and Vega-Embed, as one script.

    Raises:
        MissingExtraError: If the extra is not installed.
    """
    try:
        from vl_convert import javascript_bundle
    except ImportError as error:
        raise MissingExtraError(*MISSING) from error
    text: str = javascript_bundle()
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def write_page(found: Diff, path: Path, overwrite: bool = False) -> None:
    """Write a page.

    Args:
        found: How models differ.
        path: The file; one that modelfuse has written is replaced.
        overwrite: Whether any other file is, too.

    Raises:
        MissingExtraError: If the extra is not installed.
        OutputError: If another file is there.
    """
    replace_file(path, page(found).encode(), overwrite)


def page(found: Diff) -> str:
    """The page of what was found, as one text."""
    data = page_data(found)
    names = labels(found.models)
    return _template("page.html").substitute(
        title=escape(title_of(found, names)),
        policy=POLICY,
        version=__version__,
        style=_resource("page.css"),
        subtitle=_subtitle(found),
        findings=_listed(found.findings, "findings"),
        beside=_beside(found),
        method=_method(found),
        data=as_script(data),
        specs=as_script(templates()),
        library=library(),
        behaviour=_resource("page.js"),
    )


def title_of(found: Diff, names: Sequence[str]) -> str:
    """What a page is about."""
    base = labels([found.base])[0]
    if len(names) == 1:
        return f"{names[0]} and {base}: what differs"
    return f"{len(names)} models and {base}: what differs"


def as_script(value: object) -> str:
    r"""JSON that no text in it can end: nothing of it is HTML, wherever it stands.

    >>> as_script("</script>")
    '"\\u003c/script\\u003e"'
    """
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _resource(name: str) -> str:
    return (files("modelfuse.inspection.pictures") / name).read_text(encoding="utf-8")


def _template(name: str) -> Template:
    return Template(_resource(name))


def _subtitle(found: Diff) -> str:
    kind = "base" if found.base_given else "compared with"
    lines = [f"{kind}: {found.base}", *(f"model {number}: {path}" for number, path in enumerate(found.models, 1))]
    lines.append(f"{len(found.tensors)} tensors, {found.whole.elements:,} elements; {size(found.bytes_read)} read")
    return "<br>".join(escape(printable(line)) for line in lines)


def _listed(texts: Sequence[str], kind: str = "") -> str:
    if not texts:
        return ""
    items = "".join(f"<li>{escape(printable(text))}</li>" for text in texts)
    return f'<ul class="{kind}">{items}</ul>'


def _beside(found: Diff) -> str:
    """Differences beside the weights, and tensors that were not compared."""
    names = labels(found.models)
    beside = [f"{names[each.model]}: {each.text}" for each in found.side_differences]
    absent = [f"{each.tensor}: {each.because}" for each in found.not_compared]
    parts = []
    for title, texts in (("Beside the weights", beside), ("Not compared", absent)):
        if texts:
            shown = texts[:200]
            more = f'<p class="soft">and {len(texts) - len(shown)} more</p>' if len(texts) > len(shown) else ""
            parts.append(f"<section><h2>{title}</h2>{_listed(shown)}{more}</section>")
    return "".join(parts)


def _method(found: Diff) -> str:
    sketch = "computed exactly" if found.exact else "estimated by a sketch; its standard error is in the tooltip"
    densities = ", ".join(f"{each:g}" for each in DENSITIES)
    return escape(
        f"τ is the difference of a model to the base, ‖·‖ the Frobenius norm. Interference is {sketch}. "
        f"What trim keeps is told for the densities {densities}. Numbers are float64 sums over all elements."
    )
