"""The document of ``modelfuse report --json``."""

from __future__ import annotations

from typing import Any, Literal

from modelfuse.cli.json_output import Document
from modelfuse.inspection.diff_measures import Suggestion
from modelfuse.inspection.merge_outcome import MergeOutcome
from modelfuse.inspection.merge_report import MergeReport, SuspiciousModel


class ReportDocument(Document, frozen=True, kw_only=True):
    """How much of its inputs is in the output of a merge: ``modelfuse report --json``.

    τᵢ is the difference of model i to the base, δ that of the output. Shares are between 0 and 1, and what is
    undefined is null. ``ModelOutcome`` and ``MergeOutcome`` define the numbers.

    Attributes:
        output: The output.
        base: The model that differences are taken to: the base or, without one, the first model.
        base_given: Whether the merge had a base.
        models: The models; lists by model have their order.
        settings: The settings of the merge.
        whole: All tensors together.
        layers: Each layer.
        modules: Each kind of module, over all layers.
        cells: Each kind of module in each layer.
        tensors: Each tensor.
        suspicious: Models with suspicious tensors, as the merge reported them.
        findings: A summary in sentences.
        advice: Settings that are worth trying on the same inputs, without those of this merge.
        bytes_read: Bytes of the tensors that were read.
        seconds: Wall time.
    """

    document: Literal["report/1"] = "report/1"
    output: str
    base: str
    base_given: bool
    models: list[str]
    settings: dict[str, Any]
    whole: MergeOutcome
    layers: list[MergeOutcome]
    modules: list[MergeOutcome]
    cells: list[MergeOutcome]
    tensors: list[MergeOutcome]
    suspicious: list[SuspiciousModel]
    findings: list[str]
    advice: list[Suggestion]
    bytes_read: int
    seconds: float


def of_report(found: MergeReport) -> ReportDocument:
    """The document of a report."""
    return ReportDocument(
        output=found.output,
        base=found.base,
        base_given=found.base_given,
        models=[*found.models],
        settings=dict(found.settings),
        whole=found.whole,
        layers=[*found.layers],
        modules=[*found.modules],
        cells=[*found.cells],
        tensors=[*found.tensors],
        suspicious=[*found.suspicious],
        findings=[*found.findings],
        advice=[*found.advice],
        bytes_read=found.diff.bytes_read,
        seconds=found.seconds,
    )
