"""A recipe and the checkpoints' headers become a plan: all that a merge will do, before it does any.

No tensor data is read. The plan is frozen data; running it decides nothing but the order of work.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.checkpoints.tensors import Frame
from modelfuse.checkpoints.writer import bytes_left
from modelfuse.dtypes import BF16, OUTPUT_DTYPES, DType
from modelfuse.errors import MismatchError, OutputError, RecipeError
from modelfuse.inputs import open_inputs
from modelfuse.kernels.choice import Device
from modelfuse.matching import Tied, group_names, match_tensors
from modelfuse.memory import Budget, fit_memory
from modelfuse.methods import Method
from modelfuse.output_format import OutputFormat
from modelfuse.recipe import Recipe
from modelfuse.serving import SideFile, files_to_serve

Action = Literal["merge", "copy"]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output.

    Attributes:
        name: Its name.
        dtype: The type it is stored in.
        shape: Its shape.
        action: ``merge``, or ``copy`` for what cannot be merged and must be equal in all models.
        sources: Where it lies in each model in order, then in the base if there is one.
        chosen: For a copy, the source to take where they differ; None: they must not differ.
        file: The output file it goes to.
        offset: Its first byte in that file.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    action: Action
    sources: tuple[StoredTensor, ...]
    chosen: int | None
    file: str
    offset: int

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.sources[0].size

    @property
    def nbytes(self) -> int:
        """The number of bytes in the output."""
        return self.dtype.nbytes(self.size)

    @property
    def bytes_read(self) -> int:
        """The number of bytes in all sources together."""
        return sum(source.stored.nbytes(source.size) for source in self.sources)


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A weight file of the output: its name, and all of it but the tensors."""

    name: str
    frame: Frame

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return self.frame.size


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a merge will do.

    Attributes:
        recipe: The settings.
        method: The mathematics.
        models: The models in order, then the base if there is one.
        tensors: Every tensor of the output, in the order of the files.
        tied: Tensors of the inputs that are left out because they are another one's second name.
        files: The weight files.
        format: How they are stored.
        index: The name of the index file, None if there is one weight file.
        side_files: Configuration, tokenizer and other files to copy.
        workers: Parallel workers; fewer than asked for if the memory budget wants it.
        slice_elements: Elements a worker holds at a time.
        memory: The expected peak of resident memory in bytes.
        device: Where tensors are merged.
        notes: What the user should know.
    """

    recipe: Recipe
    method: Method
    models: tuple[Checkpoint, ...]
    tensors: tuple[OutputTensor, ...]
    tied: tuple[Tied, ...]
    files: tuple[OutputFile, ...]
    format: OutputFormat
    index: str | None
    side_files: tuple[SideFile, ...]
    workers: int
    slice_elements: int
    memory: int
    device: Device
    notes: tuple[str, ...]

    @property
    def has_base(self) -> bool:
        """Whether the last of ``models`` is the base."""
        return self.recipe.base_model_path is not None

    @property
    def lead(self) -> Checkpoint:
        """The checkpoint that the output takes its names, types and files from: the base, else the first."""
        return self.models[-1 if self.has_base else 0]

    @property
    def bytes_read(self) -> int:
        """Bytes to read, each once; measuring reads some again."""
        return sum(tensor.bytes_read for tensor in self.tensors)

    @property
    def served_dtype(self) -> str | None:
        """The type that the output's config.json is to name, None for that of the lead."""
        if self.recipe.output_dtype is not None:
            return str(OUTPUT_DTYPES[self.recipe.output_dtype])
        return str(BF16) if any(tensor.natural is not tensor.dtype for tensor in self.lead.values()) else None

    @property
    def bytes_written(self) -> int:
        """Bytes of the weight files."""
        return sum(file.size for file in self.files)


def make_plan(recipe: Recipe) -> Plan:
    """Open the checkpoints' headers and plan the merge.

    Raises:
        CheckpointError: If an input is missing or malformed.
        MismatchError: If the models do not fit together; all differences are listed.
        OutputError: If the output exists, lies inside an input, or does not fit on the disk.
        RecipeError: If ``unmerged_from`` is none of the models.
    """
    _check_places(recipe)
    models = open_inputs(recipe)
    lead = models[-1 if recipe.base_model_path is not None else 0]
    names, tied = match_tensors(models, lead)
    chosen = _chosen_source(recipe)
    drafts = [_draft(recipe, name, models, chosen) for name in names]
    _check_kinds(drafts)
    form = OutputFormat.of(recipe, lead)
    tensors, files, index = _lay_out(drafts, recipe, form)
    budget = _fit_memory(recipe, tensors)
    plan = Plan(
        recipe, recipe.method, models, tensors, tied, files, form, index, files_to_serve(recipe, lead), *budget,
        (*_notes(recipe, budget, models, lead), *form.notes(models)),
    )  # fmt: skip
    _check_room(plan)
    return plan


def _check_places(recipe: Recipe) -> None:
    output = recipe.output_path
    if output is None:
        return
    for path in recipe.input_paths:
        holds_it = output.resolve() in (path.resolve(), *path.resolve().parents)
        if holds_it or path.resolve() in output.resolve().parents:
            raise OutputError(
                f"output_path {output} and the input {path} lie inside each other", "Choose another output_path."
            )
    try:
        _check_output(output, recipe.overwrite)
    except OSError as error:
        raise OutputError(f"output_path {output}: {error.strerror}") from error


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.parent.is_dir() and output.parent.exists():
        raise OutputError(f"{output.parent} is not a folder, so output_path {output} cannot be created")
    if output.exists() and not output.is_dir():
        raise OutputError(f"output_path {output} is a file")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise OutputError(
            f"output_path {output} exists and is not empty", "Use --overwrite to replace it whole when all is done."
        )


def _chosen_source(recipe: Recipe) -> int | None:
    if recipe.unmerged_from is None:
        return None
    try:
        return recipe.input_paths.index(recipe.unmerged_from)
    except ValueError:
        raise RecipeError(
            f"unmerged_from is {recipe.unmerged_from}, which is none of the models", "Name one of the models' paths."
        ) from None


#: Tensors that a model computes from its configuration: copied, as merging them means nothing.
BUFFERS = ("rotary_emb.inv_freq", ".masked_bias")


def _draft(recipe: Recipe, name: str, models: Sequence[Checkpoint], chosen: int | None) -> OutputTensor:
    sources = tuple(model[model.aliases.get(name, name)] for model in models)
    lead = sources[-1 if recipe.base_model_path is not None else 0]
    merges = lead.dtype.compute is not None and not name.endswith(BUFFERS)
    dtype = OUTPUT_DTYPES[recipe.output_dtype] if recipe.output_dtype and merges else lead.natural
    action: Action = "merge" if merges else "copy"
    return OutputTensor(name, dtype, lead.shape, action, sources, None if merges else chosen, "", 0)


def _check_kinds(drafts: Sequence[OutputTensor]) -> None:
    mixed: dict[str, list[str]] = {}
    for draft in drafts:
        kinds = {source.dtype for source in draft.sources}
        if any(kind.compute is None for kind in kinds) if draft.action == "merge" else len(kinds) > 1:
            listed = ", ".join(str(source.dtype) for source in draft.sources)
            mixed.setdefault(listed, []).append(draft.name)
    if mixed:
        lines = [f"  {group} is {listed}" for listed, names in mixed.items() for group in group_names(names)]
        raise MismatchError(
            "The models, in order, hold these tensors in types that do not mix:\n" + "\n".join(lines),
            "Save them in one type first.",
        )


def _lay_out(
    drafts: Sequence[OutputTensor], recipe: Recipe, form: OutputFormat
) -> tuple[tuple[OutputTensor, ...], tuple[OutputFile, ...], str | None]:
    """Assign the tensors to shards in order, and each its offset."""
    shards: list[list[OutputTensor]] = [[]]
    filled = 0
    for draft in drafts:
        if shards[-1] and filled + draft.nbytes > recipe.max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(draft)
        filled += draft.nbytes
    placed: list[OutputTensor] = []
    files = []
    for number, shard in enumerate(shards, 1):
        several = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        name = f"{form.stem}{several}{form.suffix}"
        frame = form.frame([(draft.name, draft.dtype, draft.shape) for draft in shard])
        placed += (replace(draft, file=name, offset=offset) for draft, offset in zip(shard, frame.offsets, strict=True))
        files.append(OutputFile(name, frame))
    index = f"{form.stem}{form.suffix}.index.json" if len(shards) > 1 else None
    return tuple(placed), tuple(files), index


def _fit_memory(recipe: Recipe, tensors: Sequence[OutputTensor]) -> Budget:
    an_element = max(
        (sum(source.dtype.bits for source in tensor.sources) + tensor.dtype.bits) / 8 for tensor in tensors
    )
    held = max(sum(source.held for source in tensor.sources) for tensor in tensors)
    return fit_memory(recipe, an_element, len(tensors[0].sources), held)


def _check_room(plan: Plan) -> None:
    """Known from the plan, before any work: the output and what it replaces exist side by side."""
    output = plan.recipe.output_path
    if output is None:
        return
    parent = next(folder for folder in output.resolve().parents if folder.exists())
    needed = plan.bytes_written + sum(file.size for file in plan.side_files)
    free = shutil.disk_usage(parent).free + bytes_left(output)
    if needed > free:
        raise OutputError(
            f"output_path {output} needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there",
            "Free some space or choose an output_path on another disk.",
        )


def _notes(recipe: Recipe, budget: Budget, models: Sequence[Checkpoint], lead: Checkpoint) -> tuple[str, ...]:
    notes = [_note_dequantized(model) for model in models if model.dequantized]
    if recipe.device != "cpu" and not budget.device.gpu:
        notes.append("There is no GPU to be used, so the CPU does the work, as allow_cpu_fallback says.")
    if budget.workers < recipe.n_process:
        notes.append(f"{budget.workers} of {recipe.n_process} workers, so that the memory budget holds.")
    if budget.memory > recipe.memory:
        notes.append(
            f"The peak will be about {budget.memory / 1e6:,.0f} MB: slices are at their smallest, but the memory "
            f"budget is {recipe.memory / 1e6:,.0f} MB."
        )
    if not lead.config:
        notes.append(f"{lead.path} has no config.json, so none is copied; a server will need one.")
    return tuple(notes)


def _note_dequantized(model: Checkpoint) -> str:
    number = sum(tensor.natural is not tensor.dtype for tensor in model.values())
    return f"{model.path}: {number} tensors are dequantized; {len(model.left_out)} tensors of scales are left out."
