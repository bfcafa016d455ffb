"""Show a report on a merge."""

from __future__ import annotations

from collections.abc import Iterator

from modelfuse.cli.console import out
from modelfuse.cli.diff_view import advise
from modelfuse.cli.units import duration, rate
from modelfuse.inspection.diff_names import short_names
from modelfuse.inspection.merge_report import MergeReport
from modelfuse.planning.tables import Row


def show(found: MergeReport) -> None:
    """Write the report to standard output."""
    kind = "base" if found.base_given else "first model"
    out.print("[bold]{}[/] compared with its inputs; {}: {}", found.output, kind, found.base)
    out.print("")
    out.table(("model", "in output", "own part", "dropped", "reversed", "‖τ‖/‖b‖"), _models(found))
    out.print("")
    for text in found.findings:
        out.print("- {}", text)
    advise(found.advice)
    for each in found.suspicious:
        lists = ((each.equal, "equal the base's"), (each.far, "are far from the base's"))
        parts = ", ".join(f"{len(names)} {what}" for names, what in lists if names)
        out.log("note", "{}: of its tensors, {}", each.model, parts)
    speed = rate(found.diff.bytes_read, found.seconds)
    out.print("\ncompared {} tensors in {} ({})", len(found.tensors), duration(found.seconds), speed)


def _models(found: MergeReport) -> Iterator[Row]:
    whole = found.whole
    names = short_names((*found.models, found.output))
    for name, each, own in zip(names, whole.models, found.diff.whole.models, strict=False):
        yield (name, _number(each.projection), _number(each.coefficient), _share(each.dropped), _share(each.reversed),
               _share(own.relative))  # fmt: skip
    yield f"{names[-1]} (output)", "", "", "", "", _share(whole.relative)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g} %"
