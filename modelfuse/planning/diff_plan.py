"""The plan of ``diff``: the tensors to measure, from a recipe and the checkpoints' headers.

Inputs are opened and converted as for a merge, to the base's names and layout. Tensors that do not match are listed
instead of being an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.checkpoints.layer_stacks import Stack, find_stacks
from modelfuse.checkpoints.tensor_names import pattern
from modelfuse.errors import MismatchError
from modelfuse.kernels.differences import Measurement
from modelfuse.planning.adapter_inputs import with_adapter_additions
from modelfuse.planning.matching import Match, find_matches
from modelfuse.planning.memory_budget import GRAIN, Budget, demand_of, fit_memory
from modelfuse.planning.mismatch import Mismatch
from modelfuse.planning.open_inputs import open_inputs
from modelfuse.planning.operations import Operation, can_be_merged
from modelfuse.planning.whole_matrices import Cuts
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import forget

#: Of a tensor of which only some rows are compared, their number and its shape in the base.
CutRows = tuple[int, tuple[int, ...]]


class Location(NamedTuple):
    """The position of a tensor in a model.

    Attributes:
        stack: The name of its stack of layers; empty if there is only one.
        layer: The index of its layer; None outside of layers.
        module: The name of its module, with ``*`` for numbers.
    """

    stack: str
    layer: int | None
    module: str


@dataclass(frozen=True, slots=True)
class ComparedTensor:
    """A tensor to measure.

    Attributes:
        name: Its name in the base.
        sources: The tensors to read, without duplicates; the base's tensor last.
        inputs: For each source, the index of an input that contains it.
        models: For each model, the index of its source; None if it uses the base's tensor.
        measurement: The measurement to run, for the models whose tensor is not the base's.
        location: Its position in the model.
    """

    name: str
    sources: tuple[StoredTensor, ...]
    inputs: tuple[int, ...]
    models: tuple[int | None, ...]
    measurement: Measurement
    location: Location

    @property
    def bytes_read(self) -> int:
        """The number of bytes in all sources together."""
        return sum(source.stored.nbytes(source.size) for source in self.sources)


@dataclass(frozen=True, slots=True)
class DiffPlan:
    """The plan of a comparison.

    Attributes:
        recipe: The inputs, as for a merge.
        models: The models in order, then the base.
        tensors: The tensors to measure.
        left_out: Names of tensors that are not compared, with the reason.
        exact: Whether interference is computed without sketches.
        common_rows: Tensors of which only the rows of tokens that all models have are compared.
    """

    recipe: Recipe
    models: tuple[Checkpoint, ...]
    tensors: tuple[ComparedTensor, ...]
    left_out: dict[str, str]
    exact: bool
    common_rows: Mapping[str, CutRows] = field(default_factory=dict)

    @property
    def bytes_read(self) -> int:
        """Bytes to read."""
        return sum(each.bytes_read for each in self.tensors)


def make_diff_plan(recipe: Recipe, exact: bool) -> DiffPlan:
    """Open the inputs, headers only, and match their tensors.

    Args:
        recipe: The inputs; it must have a base.
        exact: Whether interference is computed without sketches.

    Raises:
        CheckpointError: If an input is missing or malformed.
        MismatchError: If no tensor can be compared.
    """
    forget()
    models, _, _ = with_adapter_additions(open_inputs(recipe))
    everything = tuple(range(len(models)))
    match, mismatch = find_matches(models, True, lambda _: everything)
    if mismatch.untied:
        raise Mismatch(models, (), (), mismatch.untied, lambda _: everything).error()
    rows, reasons = dict[str, CutRows](), dict[str, str]()
    if mismatch.misshapen:
        from modelfuse.checkpoints.vocabulary.common_rows import with_common_rows

        models, rows, reasons = with_common_rows(models, mismatch.misshapen)
    left_out = dict(_left_out(recipe, models, match, mismatch, reasons))
    names = [name for name in match.names if name not in left_out]
    if not names:
        raise MismatchError(
            "The models have no tensors of the same name and shape", "Compare models of one architecture."
        )
    tensors = tuple(_tensors(models, names, exact))
    return DiffPlan(recipe, models, tensors, left_out, exact, rows)


def _left_out(
    recipe: Recipe, models: Sequence[Checkpoint], match: Match, mismatch: Mismatch, reasons: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Names of tensors that cannot be compared, with the reason."""
    for tied in match.tied:
        yield tied.name, f"tied to {tied.other}"
    for name in mismatch.missing:
        lacking = [str(path) for path, model in zip(recipe.inputs, models, strict=True) if not model.has(name)]
        yield name, f"not in {', '.join(lacking)}"
    misshapen = [name for name in mismatch.misshapen if len({model.resolve(name).shape for model in models}) > 1]
    for name in misshapen:
        found = zip(recipe.inputs, (model.resolve(name).shape for model in models), strict=True)
        shapes = ", ".join(f"{[*shape]} in {path}" for path, shape in found)
        yield name, f"other shapes: {shapes}" + (f"; {reasons[name]}" if name in reasons else "")
    shaped = set(match.names).difference(misshapen)
    for name in match.names:
        if name in shaped and not all(can_be_merged(name, model.resolve(name)) for model in models):
            yield name, f"{models[-1].resolve(name).dtype}, not weights"


def _tensors(models: Sequence[Checkpoint], names: Sequence[str], exact: bool) -> Iterator[ComparedTensor]:
    base = models[-1]
    cuts = Cuts((base, *models), base.layout)
    stacks = find_stacks(names, base.config)
    for name in names:
        own = [model.resolve(name) for model in models]
        reference = own[-1]
        sources = list(dict.fromkeys(source for source in own[:-1] if source != reference))
        rows = tuple(None if source == reference else sources.index(source) for source in own[:-1])
        inputs = tuple(rows.index(number) for number in range(len(sources)))
        matrices = cuts.of(name, reference.shape)
        if matrices is not None and matrices.columns > GRAIN:
            matrices = None  # Rows are read whole, and this one is larger than a slice.
        measurement = Measurement(
            name, reference.size, tuple(source.dtype for source in (*sources, reference)),
            tuple((row, sources[row].is_delta) for row in rows if row is not None), matrices, exact,
        )  # fmt: skip
        if reference.size:
            yield ComparedTensor(
                name, (*sources, reference), (*inputs, len(models) - 1), rows, measurement, location_of(name, stacks)
            )


def location_of(name: str, stacks: Sequence[Stack]) -> Location:
    """The position of a tensor in a model.

    >>> names = [f"model.layers.{layer}.mlp.experts.0.w1.weight" for layer in range(2)]
    >>> [*location_of(names[1], find_stacks(names, {}))]
    ['', 1, 'mlp.experts.*.w1']
    """
    several = len(stacks) > 1
    for stack in stacks:
        layer = stack.layer_of(name)
        if layer is not None:
            rest = name.removeprefix(stack.prefix).partition(".")[2]
            return Location(stack.module if several else "", layer, _module(rest))
    outside = stacks[0].prefix.rpartition(".")[0].rpartition(".")[0] if len(stacks) == 1 else ""
    return Location("", None, _module(name.removeprefix(f"{outside}." if outside else "")))


def _module(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return pattern(module if module and leaf in ("weight", "bias") else name)


def budget_of(plan: DiffPlan) -> Budget:
    """Workers, slices and memory of a full comparison.

    Raises:
        RecipeError: If the memory budget is too small.
    """
    operations = [
        Operation(each.name, each.sources[-1].dtype, each.sources[-1].shape, "copy", each.sources, each.inputs)
        for each in plan.tensors
    ]
    demand = demand_of(plan.recipe, operations)
    whole = max(each.measurement.memory for each in plan.tensors)
    return fit_memory(plan.recipe, demand._replace(whole=whole))
