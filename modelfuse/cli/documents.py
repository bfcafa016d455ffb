"""What ``--json`` writes: one document a command, each of a documented and versioned form (docs/schemas)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct

from modelfuse.cli.diff_document import DiffDocument
from modelfuse.cli.help import steps
from modelfuse.cli.inspect_document import Inspect
from modelfuse.cli.json_output import Document
from modelfuse.cli.report_document import ReportDocument
from modelfuse.cli.tune_document import Tune
from modelfuse.errors import ModelfuseError
from modelfuse.methods.registry import MERGE_METHODS
from modelfuse.planning.warnings import warnings_of

if TYPE_CHECKING:
    from modelfuse.execution.result import Result
    from modelfuse.inspection.verify import Verification
    from modelfuse.planning.plan import Plan


class Input(Struct, frozen=True):
    """An input of a merge; weight is null for the base and where the method takes none."""

    path: str
    role: Literal["model", "base"]
    format: str
    tensors: int
    weight: float | None


class Tensor(Struct, frozen=True):
    """A tensor of the output: how it comes about, by which of the recipe's rules (from 1), and where it is stored."""

    name: str
    action: Literal["merge", "copy", "take"]
    dtype: str
    shape: list[int]
    file: str
    rule: int | None


class LeftOut(Struct, frozen=True):
    """A tensor of the inputs that the output does without."""

    tensor: str
    because: str


class Check(Document, frozen=True, kw_only=True):
    """The plan of a merge: ``modelfuse check --json``."""

    document: Literal["check/1"] = "check/1"
    settings: dict[str, Any]
    inputs: list[Input]
    tensors: list[Tensor]
    left_out: list[LeftOut]
    files: dict[str, int]
    copied_files: list[str]
    bytes_read: int
    bytes_written: int
    workers: int
    memory: int
    warnings: list[str]
    notes: list[str]


class Suspicious(Struct, frozen=True):
    """What stands out in one model: tensors that are the base's, and distances of those that are far from it."""

    path: str
    tensors: int
    equal: list[str]
    far: dict[str, float | None]


class Merge(Document, frozen=True, kw_only=True):
    """What a merge did: ``modelfuse merge --json``; all else is in ``merge_report.json`` there."""

    document: Literal["merge/1"] = "merge/1"
    output_path: str
    merged: int
    copied: int
    bytes_read: int
    bytes_written: int
    bytes_kept: int
    seconds: float
    suspicious: list[Suspicious]
    warnings: list[str]
    notes: list[str]


class Problem(Struct, frozen=True):
    """Something that is not as it should be; tensor and file are null where it is about none."""

    kind: str
    message: str
    tensor: str | None
    file: str | None


class Verify(Document, frozen=True, kw_only=True):
    """What was checked and found: ``modelfuse verify --json``."""

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


class Push(Document, frozen=True, kw_only=True):
    """Where an output is on a hub: ``modelfuse push --json``."""

    document: Literal["push/1"] = "push/1"
    name: str
    url: str
    commit: str
    private: bool


class Collect(Document, frozen=True, kw_only=True):
    """What Gram matrices were written: ``modelfuse collect --json``."""

    document: Literal["collect/1"] = "collect/1"
    output: str
    modules: int
    tokens: int


class Pair(Struct, frozen=True):
    """A name for a pair of steps."""

    merge_method: str
    sparsify_type: str | None
    merge_type: str


class Step(Struct, frozen=True):
    """A step of a merge, with its settings and their defaults in words."""

    name: str
    kind: Literal["sparsify_type", "merge_type"]
    summary: str
    formula: str
    paper: str
    measured: str
    settings: dict[str, str]


class Methods(Document, frozen=True, kw_only=True):
    """The methods: ``modelfuse methods --json``."""

    document: Literal["methods/1"] = "methods/1"
    merge_methods: list[Pair]
    steps: list[Step]


class Error(Document, frozen=True, kw_only=True):
    """Why there is no other document, whatever the command; the exit status is ``status``."""

    document: Literal["error/1"] = "error/1"
    kind: str
    message: str
    hint: str | None
    notes: list[str]
    status: int


DOCUMENTS: Sequence[type[Document]] = (
    Check,
    Merge,
    Tune,
    DiffDocument,
    Inspect,
    ReportDocument,
    Verify,
    Push,
    Collect,
    Methods,
    Error,
)


def of_plan(plan: Plan) -> Check:
    """The document of ``check``."""
    recipe = plan.recipe
    return Check(
        settings=recipe.effective(),
        inputs=[
            Input(
                str(recipe.inputs[number]),
                "base" if plan.has_base and number == len(plan.models) - 1 else "model",
                model.kind,
                len(model),
                _weight(plan, number),
            )
            for number, model in enumerate(plan.models)
        ],
        tensors=[
            Tensor(
                each.name,
                each.action,
                str(each.dtype),
                [*each.shape],
                each.file,
                None if each.rule is None else each.rule + 1,
            )
            for each in plan.tensors
        ],
        left_out=[LeftOut(tied.name, f"tied to {tied.other}") for tied in plan.tied],
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


def of_result(plan: Plan, result: Result) -> Merge:
    """The document of ``merge``."""
    return Merge(
        output_path=str(result.output_path),
        merged=result.merged,
        copied=result.copied,
        bytes_read=result.bytes_read,
        bytes_written=result.bytes_written,
        bytes_kept=result.bytes_kept,
        seconds=result.seconds,
        suspicious=[
            Suspicious(str(each.path), each.tensors, [*each.equal], dict(each.far)) for each in result.suspicious
        ],
        warnings=[*warnings_of(plan.recipe), *plan.warnings],
        notes=[*plan.notes[len(warnings_of(plan.recipe)) :]],
    )


def of_verification(found: Verification) -> Verify:
    """The document of ``verify``."""
    return Verify(
        path=str(found.path),
        holds=found.holds,
        files=found.files,
        tensors=found.tensors,
        recomputed=found.recomputed,
        seed=found.seed,
        absent=[*found.absent],
        problems=[Problem(each.kind, each.message, each.tensor, each.file) for each in found.problems],
        bytes_read=found.nbytes,
        seconds=found.seconds,
    )


def of_methods() -> Methods:
    """The document of ``methods``."""
    return Methods(
        merge_methods=[Pair(name, *steps) for name, steps in MERGE_METHODS.items()],
        steps=[Step(**vars(step)) for step in steps()],
    )


def of_error(kind: str, error: ModelfuseError, status: int) -> Error:
    """The document of a command that failed.

    Args:
        kind: The class of what was raised.
        error: What is told of it.
        status: The exit status.
    """
    return Error(
        kind=kind,
        message=error.message,
        hint=error.hint,
        notes=[*getattr(error, "__notes__", ())],
        status=status,
    )
