"""The plan of a merge, made from a recipe and the checkpoints' headers.

No tensor data is read. The plan is frozen data; execution decides only the order of work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msgspec import Struct

from modelfuse.checkpoints import Checkpoint
from modelfuse.checkpoints.adapters.adapter import Adapter
from modelfuse.checkpoints.buffers import without
from modelfuse.checkpoints.side_files import SideFile, files_to_serve, special_tokens
from modelfuse.checkpoints.tensor_names import group_names
from modelfuse.checkpoints.tensors import Frame
from modelfuse.dtypes import BF16, OUTPUT_DTYPES
from modelfuse.errors import MismatchError
from modelfuse.kernels.backends import Device
from modelfuse.kernels.kernel import Compiler
from modelfuse.planning.adapter_inputs import copied_base_tensors, with_adapter_additions
from modelfuse.planning.configured import configured_draft
from modelfuse.planning.drafts import Draft, with_vocabulary
from modelfuse.planning.input_comparison import compare_inputs
from modelfuse.planning.matching import EqualPair, Match, Tied, find_equal_pairs, match_tensors, notes_on_missing
from modelfuse.planning.memory_budget import demand_of, fit_memory
from modelfuse.planning.model_card import CARD_FILE, model_card
from modelfuse.planning.open_inputs import open_inputs
from modelfuse.planning.operations import Operation, methods_of
from modelfuse.planning.optional_packages import require
from modelfuse.planning.output_format import OutputFormat
from modelfuse.planning.output_location import check_output_path
from modelfuse.planning.rules import Rules, operations_of
from modelfuse.planning.warnings import notes_on
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import forget

if TYPE_CHECKING:
    from modelfuse.checkpoints.adapters.module_file import ModuleFile
    from modelfuse.kernels.matrix_time import Expected


class OutputFile(Struct, frozen=True):
    """A weight file of the output: its name, and its frame, which is everything but the tensors' bytes."""

    name: str
    frame: Frame

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return self.frame.size


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """What a merge reads, computes and writes.

    Attributes:
        recipe: The settings.
        models: The models in order, then the base if there is one.
        tensors: One operation per output tensor, in the order of the files.
        tied: Tensor names that are left out because they share another tensor's values.
        equal_pairs: Tensors of the inputs that must be equal.
        files: The weight files.
        format: Their format.
        index: The name of the index file; None if there is only one weight file.
        side_files: Configuration, tokenizer and other files to copy.
        made_files: Names and contents of other files to write.
        workers: Parallel workers; fewer than ``n_process`` if the memory budget requires it.
        slice_elements: Elements of a slice.
        memory: The expected peak of resident memory in bytes.
        device: The device that tensors are merged on.
        fetched: Capacity of the range cache for files in stores, in bytes; 0 without such files.
        compiler: Where kernels are compiled that are not in the code cache.
        notes: Notes for the user.
        warnings: Contradictions between the inputs' files, and which are used.
        config_changes: Settings of config.json that differ from the reference's.
        modules: Weight files of sentence-transformers modules, merged when they are written.
    """

    recipe: Recipe
    models: tuple[Checkpoint, ...]
    tensors: tuple[Operation, ...]
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
    compiler: Compiler
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    config_changes: Mapping[str, object]
    modules: tuple[ModuleFile, ...] = ()

    def __repr__(self) -> str:
        from modelfuse.planning.tables import summary

        return f"<Plan: {summary(self)}>"

    def _repr_html_(self) -> str:
        from modelfuse.planning.tables import html, models_of, rules_of, summary, tensors_of

        rules = [rules_of(self)] if self.recipe.rules else []
        return html(summary(self), models_of(self), *rules, tensors_of(self), notes=(*self.notes, *self.warnings))

    @property
    def has_base(self) -> bool:
        """Whether the last of ``models`` is the base."""
        return self.recipe.has_base

    @property
    def reference(self) -> Checkpoint:
        """The checkpoint that gives the output's tensor names, dtypes and files: the base, else the first model."""
        return self.models[self.recipe.reference]

    def inputs_of(self, tensor: Operation) -> tuple[Checkpoint, ...]:
        """The input of each of a tensor's sources."""
        return tuple(self.models[number] for number in tensor.inputs)

    @property
    def merged(self) -> int:
        """The number of tensors that are computed, by a merge or an adapter, instead of copied from an input."""
        if self.recipe.output_format == "lora":
            return len(self.tensors)
        return sum(
            each.action == "merge"
            or (each.action == "take" and isinstance(self.models[each.inputs[0]], Adapter))
            or each.sources[0].is_made
            for each in self.tensors
        )

    @property
    def reads_twice(self) -> bool:
        """Whether any tensor is measured before it is merged."""
        return any(method.reads_twice for method in methods_of(self.tensors))

    @property
    def expected(self) -> Expected | None:
        """The estimated time of whole-matrix methods; None if there are none, or on a GPU. Measures this processor."""
        solved = [
            (each.matrices, each.method, len(each.models))
            for each in self.tensors
            if each.matrices is not None and each.matrices.merged is None and each.method is not None
            and each.action == "merge"
        ]  # fmt: skip
        if not solved or self.device.gpu:
            return None
        from modelfuse.kernels.matrix_time import computation_of, expected

        return expected((computation_of(*each) for each in solved), self.workers)

    @property
    def bytes_read(self) -> int:
        """Bytes of all sources. Methods that measure first read some of them twice."""
        return sum(tensor.bytes_read for tensor in self.tensors)

    @property
    def served_dtype(self) -> str | None:
        """The dtype for the output's config.json; None to keep the reference's."""
        if self.recipe.output_dtype is not None:
            return str(OUTPUT_DTYPES[self.recipe.output_dtype])
        return str(BF16) if any(tensor.natural is not tensor.dtype for tensor in self.reference.values()) else None

    def config(self, content: bytes) -> bytes:
        """The reference's config.json, changed for the output."""
        return self.format.config(content, self.served_dtype, self.reference.dequantized, self.config_changes)

    @property
    def bytes_written(self) -> int:
        """Bytes of the weight files."""
        return sum(file.size for file in self.files)

    @property
    def disk_space(self) -> int:
        """Bytes of all files of the output, without generated text files."""
        beside = sum(file.size for file in self.side_files) + sum(file.size for file in self.modules)
        return self.bytes_written + beside


def make_plan(recipe: Recipe) -> Plan:
    """Open the checkpoints' headers and plan the merge.

    Raises:
        CheckpointError: If an input is missing or malformed.
        MissingExtraError: If it needs a library that is not installed.
        MismatchError: If the models do not fit together; all differences are listed.
        OutputError: If the output exists or overlaps an input.
        RecipeError: If ``unmerged_from`` is not among the models.
    """
    forget()
    check_output_path(recipe)
    if recipe.engine == "ray":
        require("ray", "engine ray", "merge on this machine with --engine local")
    draft = configured_draft(recipe) if recipe.mergekit is not None else _draft_of(recipe)
    _check_dtypes(draft.operations)
    tensors, files, index = _lay_out(draft.operations, recipe, draft.format)
    budget = fit_memory(recipe, demand_of(recipe, tensors))
    made = dict(draft.made_files)
    if recipe.model_card and all(file.name != CARD_FILE for file in draft.side_files):
        made.setdefault(CARD_FILE, model_card(recipe, draft.models, draft.base))
    notes = notes_on(recipe, draft.models, draft.tied, draft.format, budget, draft.side_files)
    changes = {**draft.models[recipe.reference].config_changes, **({} if recipe.mergekit else special_tokens(recipe))}
    return Plan(
        recipe, draft.models, tensors, draft.tied, draft.equal_pairs, files, draft.format, index, draft.side_files,
        made, *budget, (*notes, *draft.notes), draft.warnings, changes, draft.modules,
    )  # fmt: skip


def _draft_of(recipe: Recipe) -> Draft:
    """The draft of settings and rules."""
    models = open_inputs(recipe)
    warnings = compare_inputs(recipe, models)
    rules = Rules(recipe)
    models, policies, own = with_adapter_additions(models)
    if recipe.output_format == "lora":
        from modelfuse.planning.adapter_output import resized_in_all

        own = (*own, *(name for name in resized_in_all(models) if name not in own))
    models, originals, tokenizer_files, tokenizer_notes = with_vocabulary(recipe, models)
    match = match_tensors(models, recipe.has_base, rules.inputs_of, (*recipe.missing, *policies), own)
    models, originals = (
        tuple(without(model, match.dropped, "not in every model") for model in each) for each in (models, originals)
    )
    reference = models[recipe.reference]
    names, tied = match.names, match.tied
    equal_pairs = (*find_equal_pairs(models, tied), *copied_base_tensors(models))
    operations, made_files, more_notes = _operations(recipe, rules, models, match)
    form = OutputFormat.of(recipe, reference)
    side_files = files_to_serve(recipe, reference) if recipe.output_format != "lora" else ()
    side_files = tuple(file for file in side_files if file.name not in tokenizer_files)
    made_files = {**made_files, **tokenizer_files}
    notes = (*tokenizer_notes, *rules.notes(names), *notes_on_missing(recipe.inputs, match), *more_notes)
    base = len(models) - 1 if recipe.base_model_path is not None else None
    modules: tuple[ModuleFile, ...] = ()
    if any(file.holds_weights for file in side_files):
        from modelfuse.planning.modules import merge_modules

        modules, side_files = merge_modules(recipe, rules, models, side_files)
    return Draft(originals, operations, tied, equal_pairs, form, side_files, made_files, notes, base, warnings, modules)


def _operations(
    recipe: Recipe, rules: Rules, models: Sequence[Checkpoint], match: Match
) -> tuple[list[Operation], Mapping[str, bytes], tuple[str, ...]]:
    """The operations of a model or an adapter, its generated files, and notes for the user."""
    if recipe.output_format != "lora":
        return operations_of(recipe, rules, models, match.names, match.partial), {}, ()
    from modelfuse.planning.adapter_output import adapter_draft

    return adapter_draft(recipe, rules, models, match)


def _check_dtypes(operations: Sequence[Operation]) -> None:
    """Check that the dtypes of each operation's sources can be merged with each other."""
    mixed: dict[str, list[str]] = {}
    for operation in operations:
        dtypes = {source.dtype for source in operation.sources}
        if any(dtype.compute is None for dtype in dtypes) if operation.action != "copy" else len(dtypes) > 1:
            listed = ", ".join(str(source.dtype) for source in operation.sources)
            mixed.setdefault(listed, []).append(operation.name)
    if mixed:
        lines = [f"  {group} is {listed}" for listed, names in mixed.items() for group in group_names(names)]
        raise MismatchError(
            "The models, in order, have these tensors in dtypes that cannot be merged:\n" + "\n".join(lines),
            "Save the models in the same dtype first.",
        )


def _lay_out(
    operations: Sequence[Operation], recipe: Recipe, form: OutputFormat
) -> tuple[tuple[Operation, ...], tuple[OutputFile, ...], str | None]:
    """Assign the tensors to shards in order, and an offset to each.

    Returns:
        The operations with file and offset; the files; and the name of the index, if there are several files.
    """
    shards: list[list[Operation]] = [[]]
    filled = 0
    for operation in operations:
        if shards[-1] and filled + operation.nbytes > recipe.max_shard_size and not form.whole:
            shards.append([])
            filled = 0
        shards[-1].append(operation)
        filled += operation.nbytes
    placed: list[Operation] = []
    files = []
    for number, shard in enumerate(shards, 1):
        several = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        name = f"{form.stem}{several}{form.suffix}"
        frame = form.frame([(each.name, each.dtype, each.shape) for each in shard])
        placed += (each.at(name, offset) for each, offset in zip(shard, frame.offsets, strict=True))
        files.append(OutputFile(name, frame))
    index = form.index if len(shards) > 1 else None
    return tuple(placed), tuple(files), index
