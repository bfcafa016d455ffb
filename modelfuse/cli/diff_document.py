"""The document of ``modelfuse diff --json``."""

from __future__ import annotations

from typing import Literal

from modelfuse.cli.json_output import Document
from modelfuse.inspection.diff_result import (
    BLOCK,
    OUTLYING,
    PROBES,
    ComparedTensorFacts,
    Diff,
    NotCompared,
    SideDifference,
    Suggestion,
    TensorGroup,
)


class DiffDocument(Document, frozen=True, kw_only=True):
    """How models differ from a base and from each other: ``modelfuse diff --json``.

    τᵢ is the difference of model i to the base. Norms are Frobenius norms, shares are between 0 and 1, and what is
    undefined is null. The descriptions of ``Change``, ``ModelPair`` and ``TensorGroup`` define every number.

    Attributes:
        base: The model that differences are taken to: the base or, if none was given, the first model.
        base_given: Whether a base was given.
        models: The other models, in the order of all measures.
        exact: Whether interference was computed without sketches.
        probes: Projections per matrix in a sketch; matrices with fewer outputs are exact.
        block: The most elements of a block; large and outlying elements are relative to its root mean square.
        outlying: The least ratio of an outlying element to the root mean square of its block.
        whole: The measures of all tensors together.
        layers: By layer.
        modules: By kind of module.
        cells: By layer and kind of module.
        tensors: By tensor.
        facts: Properties of each of ``tensors``, in the same order.
        not_compared: Tensors that were not compared.
        side_differences: Differences of config, tokenizer, chat template and other files.
        findings: The main findings, as sentences.
        bytes_read: Bytes of the tensors that were read.
        seconds: Wall time.
        advice: Suggested settings of a merge, the best first.
    """

    document: Literal["diff/1"] = "diff/1"
    base: str
    base_given: bool
    models: list[str]
    exact: bool
    probes: int
    block: int
    outlying: float
    whole: TensorGroup
    layers: list[TensorGroup]
    modules: list[TensorGroup]
    cells: list[TensorGroup]
    tensors: list[TensorGroup]
    facts: list[ComparedTensorFacts]
    not_compared: list[NotCompared]
    side_differences: list[SideDifference]
    findings: list[str]
    bytes_read: int
    seconds: float
    advice: list[Suggestion]


def of_diff(found: Diff) -> DiffDocument:
    """The document of a comparison."""
    return DiffDocument(
        base=found.base,
        base_given=found.base_given,
        models=[*found.models],
        exact=found.exact,
        probes=PROBES,
        block=BLOCK,
        outlying=OUTLYING,
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
