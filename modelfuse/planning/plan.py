"""A recipe and the checkpoints' headers become a plan: all that a merge will do, before it does any.

No tensor data is read. The plan is frozen data; running it decides nothing but the order of work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.checkpoints.adapters.adapter import PEFT_CONFIG
from modelfuse.checkpoints.buffers import is_buffer
from modelfuse.checkpoints.side_files import SideFile, files_to_serve
from modelfuse.checkpoints.tensor_names import group_names
from modelfuse.checkpoints.tensors import Frame
from modelfuse.dtypes import BF16, OUTPUT_DTYPES, DType
from modelfuse.errors import MismatchError, RecipeError
from modelfuse.kernels.backends import Device
from modelfuse.methods.registry import Method
from modelfuse.planning.adapter_inputs import copies
from modelfuse.planning.matching import EqualPair, Tied, find_equal_pairs, match_tensors
from modelfuse.planning.memory_budget import Budget, MemoryDemand, fit_memory
from modelfuse.planning.open_inputs import open_inputs
from modelfuse.planning.optional_packages import need
from modelfuse.planning.output_format import OutputFormat
from modelfuse.planning.output_location import check_places
from modelfuse.planning.warnings import notes_on
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import Url, forget

Action = Literal["merge", "copy", "take"]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output.

    Attributes:
        name: Its name.
        dtype: The type it is stored in.
        shape: Its shape.
        action: ``merge``, ``copy`` for what cannot be merged and must be equal in all models, or ``take`` for what is
            one input's as it is: the base's that no model changes, or the model's where there is only one.
        sources: Where it lies in each model in order, then in the base if there is one; of what is taken, only there.
        chosen: For a copy, the source to take where they differ; None: they must not differ. Of what is taken, the
            number of the input.
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
        equal_pairs: Tensors of the inputs that must be equal.
        files: The weight files.
        format: How they are stored.
        index: The name of the index file, None if there is one weight file.
        side_files: Configuration, tokenizer and other files to copy.
        made_files: Files that the plan already has the content of, by name.
        workers: Parallel workers; fewer than asked for if the memory budget wants it.
        slice_elements: Elements a worker holds at a time.
        memory: The expected peak of resident memory in bytes.
        device: Where tensors are merged.
        fetched: Bytes of files in stores to hold while they are read; zero if there are none.
        notes: What the user should know.
    """

    recipe: Recipe
    method: Method
    models: tuple[Checkpoint, ...]
    tensors: tuple[OutputTensor, ...]
    tied: tuple[Tied, ...]
    equal_pairs: tuple[EqualPair, ...]
    files: tuple[OutputFile, ...]
    format: OutputFormat
    index: str | None
    side_files: tuple[SideFile, ...]
    made_files: Mapping[str, bytes]
    workers: int
    slice_elements: int
    memory: int
    device: Device
    fetched: int
    notes: tuple[str, ...]

    @property
    def has_base(self) -> bool:
        """Whether the last of ``models`` is the base."""
        return self.recipe.base_model_path is not None

    @property
    def reference(self) -> Checkpoint:
        """The checkpoint that the output takes its names, types and files from: the base, else the first."""
        return self.models[-1 if self.has_base else 0]

    def inputs_of(self, tensor: OutputTensor) -> tuple[Checkpoint, ...]:
        """The inputs that a tensor's sources are in: all, or the one that it is taken from."""
        if len(tensor.sources) == len(self.models):
            return self.models
        return (self.models[-1 if tensor.chosen is None else tensor.chosen],)

    @property
    def bytes_read(self) -> int:
        """Bytes to read, each once; measuring reads some again."""
        return sum(tensor.bytes_read for tensor in self.tensors)

    @property
    def served_dtype(self) -> str | None:
        """The type that the output's config.json is to name, None for that of the reference."""
        if self.recipe.output_dtype is not None:
            return str(OUTPUT_DTYPES[self.recipe.output_dtype])
        return str(BF16) if any(tensor.natural is not tensor.dtype for tensor in self.reference.values()) else None

    @property
    def bytes_written(self) -> int:
        """Bytes of the weight files."""
        return sum(file.size for file in self.files)

    @property
    def room(self) -> int:
        """Bytes of the whole output."""
        return self.bytes_written + sum(file.size for file in self.side_files)


def make_plan(recipe: Recipe) -> Plan:
    """Open the checkpoints' headers and plan the merge.

    Raises:
        CheckpointError: If an input is missing or malformed.
        MissingExtraError: If it takes a library that is not installed.
        MismatchError: If the models do not fit together; all differences are listed.
        OutputError: If the output exists or lies inside an input.
        RecipeError: If ``unmerged_from`` is none of the models.
    """
    forget()
    check_places(recipe)
    if recipe.engine == "ray":
        need("ray", "engine ray", "merge on this machine with --engine local")
    models = open_inputs(recipe)
    reference = models[-1 if recipe.base_model_path is not None else 0]
    names, tied = match_tensors(models, reference)
    equal_pairs = (*find_equal_pairs(models, tied), *copies(models))
    drafts, made_files = _drafts(recipe, models, names)
    _check_kinds(drafts)
    form = OutputFormat.of(recipe, reference)
    tensors, files, index = _lay_out(drafts, recipe, form)
    budget = _fit_memory(recipe, tensors)
    side_files = files_to_serve(recipe, reference) if recipe.output_format != "lora" else ()
    return Plan(
        recipe, recipe.method, models, tensors, tied, equal_pairs, files, form, index, side_files, made_files, *budget,
        notes_on(recipe, models, tied, form, budget, side_files),
    )  # fmt: skip


def _drafts(
    recipe: Recipe, models: Sequence[Checkpoint], names: Sequence[str]
) -> tuple[list[OutputTensor], Mapping[str, bytes]]:
    """The output's tensors, before they have a place; and the content of files that come with them."""
    chosen = _chosen_source(recipe)
    if recipe.output_format != "lora":
        return [_draft(recipe, name, models, chosen) for name in names], {}
    from modelfuse.checkpoints.adapters.as_adapter import as_adapter

    adapter, base = as_adapter(recipe, models), len(models) - 1
    dtype = OUTPUT_DTYPES[recipe.output_dtype] if recipe.output_dtype else None
    tensors = [OutputTensor(each.name, dtype or each.dtype, each.shape, "take", (each,), base, "", 0)
               for each in adapter.tensors]  # fmt: skip
    return tensors, {PEFT_CONFIG: adapter.config}


def _chosen_source(recipe: Recipe) -> int | None:
    if recipe.unmerged_from is None:
        return None
    try:
        return recipe.inputs.index(recipe.unmerged_from)
    except ValueError:
        raise RecipeError(
            f"unmerged_from is {recipe.unmerged_from}, which is none of the models", "Name one of the models' paths."
        ) from None


def _draft(recipe: Recipe, name: str, models: Sequence[Checkpoint], chosen: int | None) -> OutputTensor:
    sources = tuple(model[model.aliases.get(name, name)] for model in models)
    reference = sources[-1 if recipe.base_model_path is not None else 0]
    merges = reference.dtype.compute is not None and not is_buffer(name, reference.shape)
    dtype = OUTPUT_DTYPES[recipe.output_dtype] if recipe.output_dtype and merges else reference.natural
    action: Action = "merge" if merges else "copy"
    taken = _taken(recipe, sources, merges)
    if taken is not None:
        action = "take" if merges else "copy"
        return OutputTensor(name, dtype, reference.shape, action, (sources[taken],), taken if merges else None, "", 0)
    return OutputTensor(name, dtype, reference.shape, action, sources, None if merges else chosen, "", 0)


def _taken(recipe: Recipe, sources: Sequence[StoredTensor], merges: bool) -> int | None:
    """The number of the input that a tensor is taken from as it is, if that is all there is to do."""
    if recipe.base_model_path is None:
        return None
    *models, base = sources
    if all(source == base for source in models):
        return len(models)
    alone = merges and recipe.steps == (None, "linear") and recipe.weights == (1.0,)
    return 0 if alone and not models[0].is_delta else None


def _check_kinds(drafts: Sequence[OutputTensor]) -> None:
    mixed: dict[str, list[str]] = {}
    for draft in drafts:
        kinds = {source.dtype for source in draft.sources}
        if any(kind.compute is None for kind in kinds) if draft.action != "copy" else len(kinds) > 1:
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
        if shards[-1] and filled + draft.nbytes > recipe.max_shard_size and not form.whole:
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
    sources = [part for each in tensors for part in each.sources]
    # A slice's rows are as wide as the widest of its sources.
    sizes = {
        (each.size, len(each.sources) * max(part.dtype.bytes for part in each.sources) + each.dtype.bytes)
        for each in tensors
    }
    # Of files in stores, an element's bytes in all of its sources have to be there at a time.
    fetched = max(sum(part.stored.bytes for part in each.sources) for each in tensors)
    if not any(isinstance(path, Url) for path in recipe.input_paths):
        fetched = 0
    demand = MemoryDemand(
        len(tensors), max(len(each.sources) for each in tensors), frozenset(sizes),
        max(part.reader_bytes for part in sources), max(sum(part.held for part in each.sources) for each in tensors),
        any(part.dtype.compute == "float64" for part in sources), fetched,
    )  # fmt: skip
    return fit_memory(recipe, demand)
