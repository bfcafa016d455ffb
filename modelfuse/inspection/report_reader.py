"""What a merge reported of itself, read back: merge_report.json and merge_config.json."""

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
    """Something that is not as it should be.

    Attributes:
        kind: What was checked: the ``report`` itself, the ``recipe``, a ``file`` as a whole, the ``index``, a
            ``tensor``'s place, type and shape, its ``checksum``, ``config``.json against the shapes, the ``inputs``,
            the ``bytes`` that the recipe gives.
        message: What is wrong, naming the file and the tensor.
        tensor: The tensor, if it is about one.
        file: The file in the output, if it is about one.
    """

    kind: Kind
    message: str
    tensor: str | None = None
    file: str | None = None


Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class ReportedTensor(Struct, frozen=True, rename={"dtype_name": "dtype", "dimensions": "shape"}):
    """A tensor of the output: its type, shape and file, the checksum of its bytes, its method's and rule's numbers.

    Of one whose bytes depend on the machine that merged it, how far those of others may be apart.
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
        """Its element type."""
        return BY_NAME[self.dtype_name]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.dimensions)

    @property
    def nbytes(self) -> int:
        """The number of its bytes."""
        return self.dtype.nbytes(math.prod(self.dimensions))


class ReportedFile(Struct, frozen=True):
    """A weight file of an input, as it was when it was merged."""

    size: Count
    modified_ns: int


class ReportedInput(Struct, frozen=True):
    """An input: its path and its weight files."""

    path: str
    files: dict[str, ReportedFile]


class ReportedMethod(Struct, frozen=True):
    """The mathematics."""

    merge_type: str
    sparsify_type: str | None
    effective_weights: list[float]
    seed: int


class Report(Struct, frozen=True):
    """The parts of merge_report.json that can be checked."""

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
        """All that was read: the inputs, and files of Gram matrices."""
        return [*self.inputs, *self.grams]


def read_report(folder: PathOrUrl) -> tuple[Report, list[Problem]]:
    """Read merge_report.json.

    Returns:
        Its content, and a problem if it is not what the merge wrote.

    Raises:
        CheckpointError: If the folder is no output of modelfuse, or the report cannot be understood.
    """
    path = folder / REPORT_NAME
    if not is_dir(folder):
        raise CheckpointError(f"There is no folder {folder}", "Name the output_path of a merge.")
    if not is_file(path):
        raise CheckpointError(
            f"{folder} is not what a merge wrote: it has no {REPORT_NAME}", "Name the output_path of a merge."
        )
    content = read_json(path)
    problems = [] if _is_as_written(path, content) else [_edited()]
    try:
        report = _understood(content)
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


def _understood(content: Mapping[str, object]) -> Report:
    """The parts of a report.

    Raises:
        ValueError: If they are not there, or not as they should be; says where.
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
        # Nothing beside the output is looked at, whatever an edited report says.
        if not is_inside(name):
            raise ValueError(f"{name!r} is no file inside the folder")
    if strange := next((name for name in (*named, *report.tensors) if not is_printable(name)), None):
        raise ValueError(f"{strange!r} is no name")
    for each in report.read:
        path_or_url(each.path)
    return report


def _is_as_written(path: PathOrUrl, content: dict[str, object]) -> bool:
    """Whether the report's own checksum holds, and there is nothing in the file beside what was understood."""
    if read_whole(path) != encode_json(content):
        return False
    rest = {key: value for key, value in content.items() if key != "report_sha256"}
    return content.get("report_sha256") == hashlib.sha256(encode_json(rest)).hexdigest()


def _edited() -> Problem:
    return Problem("report", f"{REPORT_NAME} was edited or damaged: its own checksum does not hold", file=REPORT_NAME)


def read_recipe(folder: PathOrUrl, report: Report) -> tuple[Recipe | None, list[Problem]]:
    """Read merge_config.json and hold it against the report.

    Returns:
        The recipe, None if there is none; what is wrong with it.
    """
    path = folder / CONFIG_NAME
    if not is_file(path):
        listed = CONFIG_NAME in report.sha256  # Then it is told among the files that are missing.
        return None, [] if listed else [Problem("recipe", f"{CONFIG_NAME} is missing", file=CONFIG_NAME)]
    try:
        recipe = Recipe.parse(load_recipe(path))
    except RecipeError as error:
        message = f"{CONFIG_NAME} is not a recipe: {error.message}"
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
