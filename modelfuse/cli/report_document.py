"""What ``modelfuse report --json`` writes."""

from __future__ import annotations

from typing import Any, Literal

from modelfuse.cli.json_output import Document
from modelfuse.inspection.diff_measures import Advice
from modelfuse.inspection.merge_outcome import Outcome
from modelfuse.inspection.merge_report import MergeReport, SuspiciousModel


class Report(Document, frozen=True, kw_only=True):
    """What a merge kept of its inputs: ``modelfuse report --json``.

    τᵢ is the difference of model i to the base, δ that of the output. Shares are between 0 and 1, and what is
    undefined is null. The descriptions of ``Taken`` and ``Outcome`` define every number.

    Attributes:
        output: The output.
        base: What differences are taken to: the base or, where there is none, the first model.
        base_given: Whether the merge had a base.
        models: The models in order; numbers of models have theirs.
        settings: What was asked for.
        whole: Everything together.
        layers: Layer by layer.
        modules: By kind of module.
        cells: By layer and kind of module.
        tensors: Tensor by tensor.
        suspicious: Models with tensors that stood out when they were merged.
        findings: What matters, in sentences.
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
    whole: Outcome
    layers: list[Outcome]
    modules: list[Outcome]
    cells: list[Outcome]
    tensors: list[Outcome]
    suspicious: list[SuspiciousModel]
    findings: list[str]
    advice: list[Advice]
    bytes_read: int
    seconds: float


def of_report(found: MergeReport) -> Report:
    """The document of ``report``."""
    return Report(
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
