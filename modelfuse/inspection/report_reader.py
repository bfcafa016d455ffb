"""Read and validate the files that a merge writes about itself: merge_report.json and merge_config.json."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta, Struct, ValidationError, convert

from modelfuse.checkpoints import read_json
from modelfuse.checkpoints.made_files import CONFIG_NAME, REPORT_NAME
from modelfuse.dtypes import BY_NAME, DType
from modelfuse.errors import CheckpointError, RecipeError
from modelfuse.execution.report_writer import encode_json
from modelfuse.printable import is_printable
from modelfuse.recipe.checks import is_inside
from modelfuse.recipe.files import load_recipe
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import PathOrUrl, is_dir, is_file, path_or_url
from modelfuse.storage.checksums import ALGORITHM
from modelfuse.storage.files import read_whole

Kind = Literal["report", "recipe", "file", "index", "tensor", "checksum", "config", "inputs", "bytes"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A failed check of an output.

    Attributes:
        kind: The check that failed: of the ``report`` itself, the ``recipe``, a ``file`` as a whole, the ``index``, a
            ``tensor``'s file, type and shape, its ``checksum``, the shapes that ``config``.json implies, the
            ``inputs``, or the ``bytes`` that merging again gives.
        message: What is wrong, with the names of the file and the tensor.
        tensor: The tensor that it concerns, if any.
        file: The file of the output that it concerns, if any.
    """

    kind: Kind
    message: str
    tensor: str | None = None
    file: str | None = None


Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class ReportedTensor(Struct, frozen=True, rename={"dtype_name": "dtype", "dimensions": "shape"}):
    """A tensor of the output: element type, shape, file, checksum, and the numbers of its method and rule.

    If its bytes depend on the machine, ``tolerance`` is the relative difference that other machines may have.
    """

    dtype_name: Literal[*BY_NAME]  # type: ignore[valid-type]
    dimensions: Annotated[list[Count], Meta(max_length=64)]
    file: str
    checksum: str
    method: Count | None = None
    rule: Count | None = None
    tolerance: Annotated[float, Meta(ge=0, lt=1)] | None = None

    @property
    def dtype(self) -> DType:
        """The element type."""
        return BY_NAME[self.dtype_name]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return tuple(self.dimensions)

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.dtype.nbytes(math.prod(self.dimensions))


class ReportedFile(Struct, frozen=True):
    """Size and modification time of an input's weight file at the time of the merge."""

    size: Count
    modified_ns: int


class ReportedInput(Struct, frozen=True):
    """The path and the weight files of an input."""

    path: str
    files: dict[str, ReportedFile]


class ReportedMethod(Struct, frozen=True):
    """The recipe's method, weights and seed."""

    merge_type: str
    sparsify_type: str | None
    effective_weights: list[float]
    seed: int


class Report(Struct, frozen=True):
    """The parts of merge_report.json that ``verify`` checks."""

    method: ReportedMethod
    inputs: list[ReportedInput]
    files: dict[str, Count]
    tensors: dict[str, ReportedTensor]
    copied_files: list[str]
    sha256: dict[str, str]
    methods: list[dict[str, object]] | None = None
    grams: list[ReportedInput] = []

    @property
    def read(self) -> list[ReportedInput]:
        """Everything that was read: the inputs, and files of Gram matrices."""
        return [*self.inputs, *self.grams]


def read_report(folder: PathOrUrl) -> tuple[Report, list[Problem]]:
    """Read merge_report.json.

    Returns:
        The report, and a problem if its own checksum does not hold.

    Raises:
        CheckpointError: If the folder is not an output of modelfuse, or the report is invalid or of another version.
    """
    path = folder / REPORT_NAME
    if not is_dir(folder):
        raise CheckpointError(f"There is no folder {folder}", "Name the output_path of a merge.")
    if not is_file(path):
        raise CheckpointError(
            f"{folder} is not the output of a merge: it has no {REPORT_NAME}", "Name the output_path of a merge."
        )
    content = read_json(path)
    problems = [] if _is_as_written(path, content) else [_edited()]
    try:
        report = _validated(content)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not as modelfuse writes it: {error}",
            "It was edited or damaged; merge again." if problems else None,
        ) from None
    if content.get("checksum") != ALGORITHM:
        raise CheckpointError(
            f"{path} has checksums of the kind {content.get('checksum')!r}; this version knows {ALGORITHM!r}",
            "It was edited or damaged; merge again." if problems else "Use the version of modelfuse that wrote it.",
        )
    return report, problems


def _validated(content: Mapping[str, object]) -> Report:
    """The report as a struct.

    Raises:
        ValueError: If a part is missing or invalid, with its path.
    """
    try:
        report = convert(content, Report)
    except ValidationError as error:
        tensors = content.get("tensors")
        for name, entry in tensors.items() if isinstance(tensors, dict) else ():
            try:
                convert(entry, ReportedTensor)
            except ValidationError as own:
                raise ValueError(f"tensor {name}: {own}") from None
        raise ValueError(str(error)) from None
    named = [*report.files, *report.copied_files, *report.sha256, *(each.file for each in report.tensors.values())]
    for name in [*named, *(name for each in report.read for name in each.files)]:
        # An edited report must not lead to files outside of the folder.
        if not is_inside(name):
            raise ValueError(f"{name!r} is no file inside the folder")
    if strange := next((name for name in (*named, *report.tensors) if not is_printable(name)), None):
        raise ValueError(f"{strange!r} is no name")
    for each in report.read:
        path_or_url(each.path)
    return report


def _is_as_written(path: PathOrUrl, content: dict[str, object]) -> bool:
    """Whether the file has exactly the bytes of its encoded content, and the report's own checksum holds."""
    if read_whole(path) != encode_json(content):
        return False
    rest = {key: value for key, value in content.items() if key != "report_sha256"}
    return content.get("report_sha256") == hashlib.sha256(encode_json(rest)).hexdigest()


def _edited() -> Problem:
    return Problem("report", f"{REPORT_NAME} was edited or damaged: its own checksum does not hold", file=REPORT_NAME)


def read_recipe(folder: PathOrUrl, report: Report) -> tuple[Recipe | None, list[Problem]]:
    """Read merge_config.json and compare it with the report.

    Returns:
        The recipe, None if there is none; the contradictions.
    """
    path = folder / CONFIG_NAME
    if not is_file(path):
        listed = CONFIG_NAME in report.sha256  # Then it is reported as a missing file.
        return None, [] if listed else [Problem("recipe", f"{CONFIG_NAME} is missing", file=CONFIG_NAME)]
    try:
        recipe = Recipe.parse(load_recipe(path))
    except RecipeError as error:
        message = f"{CONFIG_NAME} is not a valid recipe: {error.message}"
        return None, [Problem("recipe", message, file=CONFIG_NAME)]
    (merge_type, sparsify_type, weights), said = recipe.method_told, report.method
    pairs: list[tuple[str, object, object]] = [
        ("merge_type", merge_type, said.merge_type),
        ("sparsify_type", sparsify_type, said.sparsify_type),
        ("the weights", weights, said.effective_weights),
        ("the seed", recipe.seed, said.seed),
        ("the inputs", [str(each) for each in recipe.inputs], [each.path for each in report.inputs]),
    ]
    return recipe, [
        Problem("recipe", f"{name}: {CONFIG_NAME} says {one}, {REPORT_NAME} {other}", file=CONFIG_NAME)
        for name, one, other in pairs
        if one != other
    ]
