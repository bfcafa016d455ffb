"""A recipe and the checkpoints' headers become a plan: all that a merge will do, before it does any.

No tensor data is read. The plan is frozen data; running it decides nothing but the order of work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
from modelfuse.kernels.matrix_time import Expected, computation_of, expected
from modelfuse.planning.adapter_inputs import copies, with_what_adapters_bring
from modelfuse.planning.configured import configured_draft
from modelfuse.planning.drafts import Draft, with_vocabulary
from modelfuse.planning.input_comparison import compare_inputs
from modelfuse.planning.matching import EqualPair, Match, Tied, find_equal_pairs, match_tensors, of_missing
from modelfuse.planning.memory_budget import demand_of, fit_memory
from modelfuse.planning.model_card import CARD_FILE, model_card
from modelfuse.planning.open_inputs import open_inputs
from modelfuse.planning.operations import Operation, methods_of
from modelfuse.planning.optional_packages import need
from modelfuse.planning.output_format import OutputFormat
from modelfuse.planning.output_location import check_places
from modelfuse.planning.rules import Rules, operations_of
from modelfuse.planning.tables import html, models_of, rules_of, summary, tensors_of
from modelfuse.planning.warnings import notes_on
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import forget

if TYPE_CHECKING:
    from modelfuse.checkpoints.adapters.module_file import ModuleFile


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A weight file of the output: its name, and all of it but the tensors."""

    name: str
    frame: Frame

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return self.frame.size


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """All that a merge will do.

    Attributes:
        recipe: The settings.
        models: The models in order, then the base if there is one.
        tensors: How every tensor of the output is made, in the order of the files.
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
        compiler: What compiles kernels that never were.
        notes: What the user should know.
        warnings: What the inputs contradict each other in, and whose is taken.
        config_changes: Settings of config.json that are not the reference's.
        modules: Weight files of modules, merged when they are written.
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
        return f"<Plan: {summary(self)}>"

    def _repr_html_(self) -> str:
        rules = [rules_of(self)] if self.recipe.rules else []
        return html(summary(self), models_of(self), *rules, tensors_of(self), notes=(*self.notes, *self.warnings))

    @property
    def has_base(self) -> bool:
        """Whether the last of ``models`` is the base."""
        return self.recipe.has_base

    @property
    def reference(self) -> Checkpoint:
        """The checkpoint that the output takes its names, types and files from: the base, else the first."""
        return self.models[self.recipe.reference]

    def inputs_of(self, tensor: Operation) -> tuple[Checkpoint, ...]:
        """The inputs that a tensor's sources are of, source by source."""
        return tuple(self.models[number] for number in tensor.inputs)

    @property
    def merged(self) -> int:
        """How many tensors are none of an input's as they were: merged, or computed by an adapter."""
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
        """About how long methods of whole matrices compute; None if there are none. Measures this processor."""
        return expected(
            (computation_of(each.matrices, each.method, len(each.models))
             for each in self.tensors
             if each.matrices is not None and each.matrices.merged is None and each.method is not None
             and each.action == "merge"),
            self.workers,
        )  # fmt: skip

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

    def config(self, content: bytes) -> bytes:
        """The reference's config.json as it is true of the output."""
        return self.format.config(content, self.served_dtype, self.reference.dequantized, self.config_changes)

    @property
    def bytes_written(self) -> int:
        """Bytes of the weight files."""
        return sum(file.size for file in self.files)

    @property
    def disk_space(self) -> int:
        """Bytes of all files of the output."""
        beside = sum(file.size for file in self.side_files) + sum(file.size for file in self.modules)
        return self.bytes_written + beside


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
    draft = configured_draft(recipe) if recipe.mergekit is not None else _draft_of(recipe)
    _check_kinds(draft.operations)
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
    """What becomes of every tensor, by settings and rules."""
    models = open_inputs(recipe)
    warnings = compare_inputs(recipe, models)
    rules = Rules(recipe)
    models, policies, own = with_what_adapters_bring(models)
    if recipe.output_format == "lora":
        from modelfuse.planning.adapter_output import resized

        own = (*own, *(name for name in resized(models) if name not in own))
    models, told, tokenizer_files, words = with_vocabulary(recipe, models)
    match = match_tensors(models, recipe.has_base, rules.inputs_of, (*recipe.missing, *policies), own)
    models, told = (
        tuple(without(model, match.dropped, "not in every model") for model in each) for each in (models, told)
    )
    reference = models[recipe.reference]
    names, tied = match.names, match.tied
    equal_pairs = (*find_equal_pairs(models, tied), *copies(models))
    drafts, made_files, more = _drafts(recipe, rules, models, match)
    form = OutputFormat.of(recipe, reference)
    side_files = files_to_serve(recipe, reference) if recipe.output_format != "lora" else ()
    side_files = tuple(file for file in side_files if file.name not in tokenizer_files)
    made_files, notes = (
        {**made_files, **tokenizer_files},
        (*words, *rules.notes(names), *of_missing(recipe.inputs, match), *more),
    )
    base = len(models) - 1 if recipe.base_model_path is not None else None
    modules: tuple[ModuleFile, ...] = ()
    if any(file.holds_weights for file in side_files):
        from modelfuse.planning.modules import merge_modules

        modules, side_files = merge_modules(recipe, rules, models, side_files)
    return Draft(told, drafts, tied, equal_pairs, form, side_files, made_files, notes, base, warnings, modules)


def _drafts(
    recipe: Recipe, rules: Rules, models: Sequence[Checkpoint], match: Match
) -> tuple[list[Operation], Mapping[str, bytes], tuple[str, ...]]:
    """The output's tensors, before they have a place; the content of files that come with them; what to tell."""
    if recipe.output_format != "lora":
        return operations_of(recipe, rules, models, match.names, match.partial), {}, ()
    from modelfuse.planning.adapter_output import adapter_draft

    return adapter_draft(recipe, rules, models, match)


def _check_kinds(drafts: Sequence[Operation]) -> None:
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
    drafts: Sequence[Operation], recipe: Recipe, form: OutputFormat
) -> tuple[tuple[Operation, ...], tuple[OutputFile, ...], str | None]:
    """Assign the tensors to shards in order, and each its offset."""
    shards: list[list[Operation]] = [[]]
    filled = 0
    for draft in drafts:
        if shards[-1] and filled + draft.nbytes > recipe.max_shard_size and not form.whole:
            shards.append([])
            filled = 0
        shards[-1].append(draft)
        filled += draft.nbytes
    placed: list[Operation] = []
    files = []
    for number, shard in enumerate(shards, 1):
        several = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        name = f"{form.stem}{several}{form.suffix}"
        frame = form.frame([(draft.name, draft.dtype, draft.shape) for draft in shard])
        placed += (draft.at(name, offset) for draft, offset in zip(shard, frame.offsets, strict=True))
        files.append(OutputFile(name, frame))
    index = form.index if len(shards) > 1 else None
    return tuple(placed), tuple(files), index
