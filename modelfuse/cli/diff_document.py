"""What ``modelfuse diff --json`` writes."""

from __future__ import annotations

from typing import Literal

from modelfuse.cli.json_output import Document
from modelfuse.inspection import diff_result
from modelfuse.inspection.diff_result import Advice, Group, NotCompared, SideDifference, TensorFacts


class DiffDocument(Document, frozen=True, kw_only=True):
    """How models differ from a base and from each other: ``modelfuse diff --json``.

    τᵢ is the difference of model i to the base. Norms are Frobenius norms, shares are between 0 and 1, and what is
    undefined is null. The descriptions of ``Change``, ``ModelPair`` and ``Group`` define every number.

    Attributes:
        base: What differences are taken to: the base or, where none was given, the first model.
        base_given: Whether it was given as a base.
        models: All other models; measures have their order.
        exact: Whether interference was computed exactly for every matrix.
        probes: Sums of outputs that a sketch keeps of a matrix; smaller matrices are exact.
        block: Elements of a block, at most, from whose root mean square "large" and "outlying" are told.
        outlying: How many times the root mean square an outlying element is at least.
        whole: Everything together.
        layers: Layer by layer.
        modules: By kind of module.
        cells: By layer and kind of module.
        tensors: Tensor by tensor.
        facts: What else is known of each of ``tensors``, in their order.
        not_compared: Tensors that were not compared.
        side_differences: Differences of config, tokenizer, chat template and other files.
        findings: What matters, in sentences.
        bytes_read: Bytes of the tensors that were read.
        seconds: Wall time.
        advice: Settings of a merge that are worth trying, the best first.
    """

    document: Literal["diff/1"] = "diff/1"
    base: str
    base_given: bool
    models: list[str]
    exact: bool
    probes: int
    block: int
    outlying: float
    whole: Group
    layers: list[Group]
    modules: list[Group]
    cells: list[Group]
    tensors: list[Group]
    facts: list[TensorFacts]
    not_compared: list[NotCompared]
    side_differences: list[SideDifference]
    findings: list[str]
    bytes_read: int
    seconds: float
    advice: list[Advice]


def of_diff(found: diff_result.Diff) -> DiffDocument:
    """The document of ``diff``."""
    return DiffDocument(
        base=found.base,
        base_given=found.base_given,
        models=[*found.models],
        exact=found.exact,
        probes=diff_result.PROBES,
        block=diff_result.BLOCK,
        outlying=diff_result.OUTLYING,
        whole=found.whole,
        layers=[*found.layers],
        modules=[*found.modules],
        cells=[*found.cells],
        tensors=[*found.tensors],
        facts=[*found.facts],
        not_compared=[*found.not_compared],
        side_differences=[*found.side_differences],
        findings=[*found.findings],
        bytes_read=found.bytes_read,
        seconds=found.seconds,
        advice=[*found.advice],
    )
