"""The operations of a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.adapters.arrays import Recent
from modelfuse.checkpoints.buffers import is_buffer
from modelfuse.checkpoints.layer_stacks import Stack
from modelfuse.checkpoints.tensor_names import HEADS, group_names
from modelfuse.dtypes import F32, OUTPUT_DTYPES, DType, computed_in
from modelfuse.errors import MismatchError
from modelfuse.methods.linear import LINEAR
from modelfuse.methods.random import stream_key
from modelfuse.methods.registry import apply
from modelfuse.planning.arcee.models import OpenModel
from modelfuse.planning.matching import Tied
from modelfuse.planning.mixture.gates import Gates
from modelfuse.planning.mixture.kinds import PROJECTIONS, MixtureKind
from modelfuse.planning.mixture.tensors import MadeTensor, NoisyTensor, Zeros
from modelfuse.planning.operations import Operation, merged, taken
from modelfuse.recipe.arcee.mixture import Expert, Mixture
from modelfuse.recipe.arcee.references import Reference
from modelfuse.recipe.recipe import Recipe

_MLP, _DOWN = "mlp.", "down_proj"


@dataclass
class MixtureBuilder:
    """Builds the operations of a mixture.

    Attributes:
        recipe: The other settings.
        mixture: The mergekit-moe configuration.
        kind: The kind of mixture.
        models: Its models.
        gates: Makes the routers.
        tied: Names that the output leaves out because they share another tensor's values.
        problems: Descriptions of mismatches.
    """

    recipe: Recipe
    mixture: Mixture
    kind: MixtureKind
    models: Mapping[Reference, OpenModel]
    gates: Gates
    tied: list[Tied] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _shapes: dict[tuple[bool, str], tuple[int, ...]] = field(default_factory=dict)
    _unplaced: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        named = self.recipe.output_dtype or self.mixture.dtype
        self._dtype: DType | None = None if named is None else OUTPUT_DTYPES[named]
        self._base = self.models[self.mixture.base_model]
        self._stack = stack_of(self._base)

    def build(self) -> list[Operation]:
        """Build the operations, in the order of the base's tensors.

        Raises:
            MismatchError: If the models do not fit; lists all problems.
        """
        for model in self.models.values():
            if stack_of(model).count != self._stack.count:
                self.problems.append(
                    f"{model.reference} has {stack_of(model).count} layers, {self._base.reference} {self._stack.count}"
                )
        found = [] if self.problems else list(self._operations())
        where = f"not in a {self.kind.name} model, but in {self._base.reference}"
        self.problems += [f"{where}: {group}" for group in group_names(self._unplaced)]
        if self.problems:
            lines = "\n".join(f"  {problem}" for problem in dict.fromkeys(self.problems))
            raise MismatchError(
                f"The models do not fit into a mixture of experts:\n{lines}",
                "Give models of the same architecture and size, or another architecture: for the output.",
            )
        return found

    @property
    def expert_size(self) -> int:
        """The intermediate size of the experts."""
        return self._shapes[False, PROJECTIONS[0]][0]

    @property
    def shared_size(self) -> int | None:
        """The intermediate size of the shared expert, if there is one."""
        shape = self._shapes.get((True, PROJECTIONS[0]))
        return None if shape is None else shape[0]

    def _operations(self) -> Iterator[Operation]:
        checkpoint, done = self._base.checkpoint, set[int]()
        for name in (*checkpoint, *checkpoint.aliases):
            tensor, layer = checkpoint.resolve(name), self._stack.layer_of(name)
            part = "" if layer is None else name.removeprefix(f"{self._stack.prefix}{layer}.")
            if layer is None:
                if name in checkpoint.aliases and name.endswith(HEADS) and self._base.ties:
                    self.tied.append(Tied(name, checkpoint.aliases[name]))
                else:
                    yield self._taken(name, tensor, self._base)
            elif part.startswith(_MLP):
                if layer not in done:
                    done.add(layer)
                    yield from self._block(layer)
            elif part in self.kind.layer:
                yield self._taken(name, tensor, self._base)
                yield from self._missing_bias(name, tensor, part)
            elif not is_buffer(name, tensor.shape):
                self._unplaced.append(name)

    def _missing_bias(self, name: str, weight: StoredTensor, part: str) -> Iterator[Operation]:
        """A bias of zeros, if the kind requires a bias for this weight and the base has none."""
        if part.replace(".weight", ".bias") not in self.kind.biases or not name.endswith(".weight"):
            return
        bias = name.removesuffix(".weight") + ".bias"
        if bias not in self._base.checkpoint:
            shape = weight.shape[:1]
            zeros = MadeTensor(bias, F32, shape, weight.file, weight.offset, Zeros(shape), "zeros", 0, None, Recent(4))
            yield taken(bias, zeros, self._base.number, dtype=self._dtype or weight.natural)

    def _block(self, layer: int) -> Iterator[Operation]:
        """The router and the experts of one layer."""
        kind, dtype = self.kind, self._dtype or self.gates.embedding.natural
        block = f"{self._stack.prefix}{layer}.{kind.block}."
        name = f"{block}gate.weight"
        yield taken(name, self.gates.router(name, layer), self._base.number, dtype=dtype)
        for number, expert in enumerate(self.mixture.experts):
            yield from self._expert(f"{block}experts.{number}.", expert, layer, number)
        for shared in self.mixture.shared:
            yield from self._expert(f"{block}{kind.shared}.", shared, layer, None)
            if kind.shared_gate:
                name = f"{block}{kind.shared_gate}.weight"
                yield taken(name, self.gates.shared(name, layer), self._base.number, dtype=dtype)

    def _expert(self, prefix: str, expert: Expert, layer: int, number: int | None) -> Iterator[Operation]:
        model = self.models[expert.model]
        where = f"{stack_of(model).prefix}{layer}.{_MLP}"
        known = {f"{where}{part}.weight" for part in PROJECTIONS}
        if more := [each for each in model.checkpoint if each.startswith(where) and each not in known]:
            self.problems += [f"not in an expert, but in {model.reference}: {each}" for each in group_names(more)]
        for part in PROJECTIONS:
            source = model.find(f"{where}{part}.weight")
            if source is None:
                self.problems.append(f"not in {model.reference}: {where}{part}.weight")
            elif self._fits(source, part, model, shared=number is None):
                target = self.kind.projection(part) if number is not None else part
                yield self._projection(f"{prefix}{target}.weight", source, expert, part == _DOWN, number or 0)

    def _fits(self, source: StoredTensor, part: str, model: OpenModel, *, shared: bool) -> bool:
        """Whether a weight has the other experts' shape and the base's hidden size; else a problem is added."""
        width, first = self.gates.embedding.shape[1], self._shapes.setdefault((shared, part), source.shape)
        axis = 0 if part == _DOWN else 1
        if len(source.shape) == 2 and source.shape == first and source.shape[axis] == width:
            return True
        wanted = list(first) if source.shape != first else f"{width} {'rows' if axis == 0 else 'columns'}"
        self.problems.append(f"{source.name} has the shape {list(source.shape)} in {model.reference}, not {wanted}")
        return False

    def _projection(self, name: str, source: StoredTensor, expert: Expert, last: bool, number: int) -> Operation:
        model, natural = self.models[expert.model], source.natural
        if expert.noise:
            key, kind = stream_key(self.recipe.seed, number + 1, name), computed_in(source.dtype)
            source = NoisyTensor(source.name, kind, source.shape, source.file, source.offset, source, expert.noise, key)
        dtype = self._dtype or natural
        if not last or expert.scale == 1.0:
            return taken(name, source, model.number, dtype=dtype)
        scaled = apply(None, LINEAR, (expert.scale,), {})
        return merged(name, (source,), (model.number,), scaled, has_base=False, dtype=dtype)

    def _taken(self, name: str, tensor: StoredTensor, model: OpenModel) -> Operation:
        return taken(name, tensor, model.number, dtype=self._dtype)


def stack_of(model: OpenModel) -> Stack:
    """The stack of layers of a model that has only one.

    Raises:
        MismatchError: If it has several or none.
    """
    if len(model.stacks) != 1:
        raise MismatchError(
            f"{model.reference} has {len(model.stacks)} stacks of layers, but only models with one can be experts",
            "Give dense language models.",
        )
    return model.stacks[0]
