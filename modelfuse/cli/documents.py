"""The documents that ``--json`` writes, one form per command, versioned and described in docs/schemas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct

from modelfuse.cli.diff_document import DiffDocument
from modelfuse.cli.help import StepFacts, steps
from modelfuse.cli.inspect_document import InspectDocument
from modelfuse.cli.json_output import Document
from modelfuse.cli.report_document import ReportDocument
from modelfuse.cli.tune_document import TuneDocument
from modelfuse.errors import ModelfuseError
from modelfuse.inspection.report_reader import Problem
from modelfuse.methods.registry import MERGE_METHODS
from modelfuse.planning.warnings import warnings_of

if TYPE_CHECKING:
    from modelfuse.execution.result import Result
    from modelfuse.inspection.verify import Verification
    from modelfuse.planning.hub.upload import Pushed
    from modelfuse.planning.plan import Plan


class PlannedInput(Struct, frozen=True):
    """An input of a merge; weight is null for the base, and for methods without weights."""

    path: str
    role: Literal["model", "base"]
    format: str
    tensors: int
    weight: float | None


class PlannedTensor(Struct, frozen=True):
    """A tensor of the output: the action that gives its values, its file, and the number of its rule, from 1 on."""

    name: str
    action: Literal["merge", "copy", "take"]
    dtype: str
    shape: list[int]
    file: str
    rule: int | None


class LeftOutTensor(Struct, frozen=True):
    """A tensor of the inputs that the output does not contain."""

    tensor: str
    because: str


class CheckDocument(Document, frozen=True, kw_only=True):
    """The plan of a merge: ``modelfuse check --json``."""

    document: Literal["check/1"] = "check/1"
    settings: dict[str, Any]
    inputs: list[PlannedInput]
    tensors: list[PlannedTensor]
    left_out: list[LeftOutTensor]
    files: dict[str, int]
    copied_files: list[str]
    bytes_read: int
    bytes_written: int
    workers: int
    memory: int
    warnings: list[str]
    notes: list[str]


class SuspiciousTensors(Struct, frozen=True):
    """Suspicious tensors of one model: those that equal the base's, and relative distances of those far from it."""

    path: str
    tensors: int
    equal: list[str]
    far: dict[str, float | None]


class MergeDocument(Document, frozen=True, kw_only=True):
    """The result of a merge: ``modelfuse merge --json``. Details are in ``merge_report.json`` in the output."""

    document: Literal["merge/1"] = "merge/1"
    output_path: str
    merged: int
    copied: int
    bytes_read: int
    bytes_written: int
    bytes_kept: int
    seconds: float
    suspicious: list[SuspiciousTensors]
    warnings: list[str]
    notes: list[str]


class VerifyDocument(Document, frozen=True, kw_only=True):
    """The result of a verification: ``modelfuse verify --json``."""

    document: Literal["verify/1"] = "verify/1"
    path: str
    holds: bool
    files: int
    tensors: int
    recomputed: int
    seed: int
    absent: list[str]
    problems: list[Problem]
    bytes_read: int
    seconds: float


class PushDocument(Document, frozen=True, kw_only=True):
    """An uploaded output: ``modelfuse push --json``."""

    document: Literal["push/1"] = "push/1"
    name: str
    url: str
    commit: str
    private: bool


class CollectDocument(Document, frozen=True, kw_only=True):
    """Collected Gram matrices: ``modelfuse collect --json``."""

    document: Literal["collect/1"] = "collect/1"
    output: str
    modules: int
    tokens: int


class MethodSteps(Struct, frozen=True):
    """The steps of a method."""

    merge_method: str
    sparsify_type: str | None
    merge_type: str


class MethodsDocument(Document, frozen=True, kw_only=True):
    """The methods and their steps: ``modelfuse methods --json``."""

    document: Literal["methods/1"] = "methods/1"
    merge_methods: list[MethodSteps]
    steps: list[StepFacts]


class ErrorDocument(Document, frozen=True, kw_only=True):
    """The error of a failed command, instead of its document; ``status`` is the exit status."""

    document: Literal["error/1"] = "error/1"
    kind: str
    message: str
    hint: str | None
    notes: list[str]
    status: int


DOCUMENTS: Sequence[type[Document]] = (
    CheckDocument, MergeDocument, TuneDocument, DiffDocument, InspectDocument, ReportDocument, VerifyDocument,
    PushDocument, CollectDocument, MethodsDocument, ErrorDocument,
)  # fmt: skip


def of_plan(plan: Plan) -> CheckDocument:
    """The document of a plan."""
    recipe = plan.recipe
    return CheckDocument(
        settings=recipe.effective(),
        inputs=[
            PlannedInput(
                str(recipe.inputs[number]),
                "base" if plan.has_base and number == len(plan.models) - 1 else "model",
                model.kind,
                len(model),
                _weight(plan, number),
            )
            for number, model in enumerate(plan.models)
        ],
        tensors=[
            PlannedTensor(
                each.name,
                each.action,
                str(each.dtype),
                [*each.shape],
                each.file,
                None if each.rule is None else each.rule + 1,
            )
            for each in plan.tensors
        ],
        left_out=[LeftOutTensor(tied.name, f"tied to {tied.other}") for tied in plan.tied],
        files={file.name: file.size for file in plan.files},
        copied_files=[file.name for file in plan.side_files],
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        workers=plan.workers,
        memory=plan.memory,
        warnings=[*warnings_of(recipe), *plan.warnings],
        notes=[*plan.notes[len(warnings_of(recipe)) :]],
    )


def _weight(plan: Plan, number: int) -> float | None:
    recipe = plan.recipe
    if recipe.mergekit is not None or not recipe.parameters.has_weights or number >= len(recipe.weights):
        return None
    return recipe.weights[number]


def of_result(plan: Plan, result: Result) -> MergeDocument:
    """The document of a merge."""
    return MergeDocument(
        output_path=str(result.output_path),
        merged=result.merged,
        copied=result.copied,
        bytes_read=result.bytes_read,
        bytes_written=result.bytes_written,
        bytes_kept=result.bytes_kept,
        seconds=result.seconds,
        suspicious=[
            SuspiciousTensors(str(each.path), each.tensors, [*each.equal], dict(each.far)) for each in result.suspicious
        ],
        warnings=[*warnings_of(plan.recipe), *plan.warnings],
        notes=[*plan.notes[len(warnings_of(plan.recipe)) :]],
    )


def of_verification(found: Verification) -> VerifyDocument:
    """The document of a verification."""
    return VerifyDocument(
        path=str(found.path),
        holds=found.holds,
        files=found.files,
        tensors=found.tensors,
        recomputed=found.recomputed,
        seed=found.seed,
        absent=[*found.absent],
        problems=[*found.problems],
        bytes_read=found.nbytes,
        seconds=found.seconds,
    )


def of_upload(pushed: Pushed) -> PushDocument:
    """The document of an upload."""
    return PushDocument(name=pushed.name, url=pushed.url, commit=pushed.commit, private=pushed.private)


def of_methods() -> MethodsDocument:
    """The document of all methods."""
    return MethodsDocument(
        merge_methods=[MethodSteps(name, *pair) for name, pair in MERGE_METHODS.items()],
        steps=[*steps()],
    )


def of_error(kind: str, error: ModelfuseError, status: int) -> ErrorDocument:
    """The document of a command that failed.

    Args:
        kind: The name of the exception's class.
        error: The error with the message, the hint and notes.
        status: The exit status.
    """
    return ErrorDocument(
        kind=kind,
        message=error.message,
        hint=error.hint,
        notes=[*getattr(error, "__notes__", ())],
        status=status,
    )
