"""Match every output tensor with the tensors of the models that it is merged from, by the configuration's slices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from modelfuse.checkpoints.layer_stacks import DEFAULT, SHARED, Stack, comes_first, module_of
from modelfuse.errors import RecipeError
from modelfuse.planning.arcee.models import OpenModel
from modelfuse.recipe.arcee.configuration import DEFAULT_MODULE, Configuration, ConfiguredModule, Slice, Source
from modelfuse.recipe.arcee.parameters import depth_of
from modelfuse.recipe.arcee.references import Reference

#: Other module names that a configuration may use for a module.
_STAND_INS = {SHARED: ("decoder", "encoder"), DEFAULT: ("text_decoder",)}


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of the output.

    Attributes:
        name: Its name.
        module: The configuration's module that contains it.
        part: The slice that contains it.
        depth: The position in gradients, from 0 to 1.
        names: Its name in each source of the slice.
    """

    name: str
    module: ConfiguredModule
    part: Slice
    depth: float
    names: tuple[str, ...]

    @property
    def sources(self) -> Sequence[Source]:
        """The sources of its slice."""
        return self.part.sources


@dataclass(frozen=True)
class Arrangement:
    """The layers and tensors of the output.

    Attributes:
        slots: The tensors.
        layers: For each stack of the donor, by module, the sources of the output's layers for config.json: stack, model
            and layer.
        left_out: For each model, the names of its tensors that no slice contains.
        is_whole: Whether all layers of all models are merged, so that names do not change.
    """

    slots: tuple[Slot, ...]
    layers: Mapping[str, tuple[tuple[Stack, OpenModel, int], ...]]
    left_out: Mapping[Reference, tuple[str, ...]]
    is_whole: bool


def arrange(configuration: Configuration, models: Mapping[Reference, OpenModel], donor: OpenModel) -> Arrangement:
    """List the output's tensors.

    Args:
        configuration: The mergekit configuration.
        models: Its models.
        donor: The model whose structure the output has.

    Raises:
        RecipeError: If the configuration's modules or layer ranges do not fit the models.
    """
    return _Arranger(configuration, models, donor).arranged()


class _Arranger:
    def __init__(self, configuration: Configuration, models: Mapping[Reference, OpenModel], donor: OpenModel) -> None:
        self._configuration, self._models, self._donor = configuration, models, donor
        self._order = {name: number for number, name in enumerate([*donor.checkpoint, *donor.checkpoint.aliases])}
        self._taken: dict[Reference, set[str]] = {}
        self._layers: dict[tuple[Reference, str], dict[int, list[str]]] = {}

    def arranged(self) -> Arrangement:
        stacks = self._donor.stacks
        self._check_modules([stack.module for stack in stacks])
        slots, layers = list[Slot](), dict[str, tuple[tuple[Stack, OpenModel, int], ...]]()
        for stack in stacks:
            module = self._module(stack.module)
            slots += self._in_layers(stack, module)
            layers[stack.module] = tuple(self._origins(stack, module))
        slots += self._outside()
        if self._is_whole:
            slots.sort(key=lambda slot: self._order.get(slot.name, len(self._order)))
        else:
            slots = [*(slot for slot in slots if comes_first(slot.name)),
                     *(slot for slot in slots if not comes_first(slot.name))]  # fmt: skip
        return Arrangement(tuple(slots), layers, self._left_out(), self._is_whole)

    @property
    def _is_whole(self) -> bool:
        """As in :class:`Arrangement`."""
        parts = (part for module in self._configuration.modules.values() for part in module.slices)
        return all(part.sources[0].layers is None for part in parts)

    def _check_modules(self, known: Sequence[str]) -> None:
        if self._configuration.applies_to_all:
            if not self._is_whole and len(known) != 1:
                found = f"several: {', '.join(known)}" if known else "none"
                raise RecipeError(
                    f"slices are layers of one stack, but {self._donor.reference} has {found}",
                    "Write modules: with slices: for each of them." if known else "Use models: instead.",
                )
            return
        for name in known:
            self._module(name)

    def _module(self, name: str) -> ConfiguredModule:
        """The configuration of a module of the model."""
        modules = self._configuration.modules
        if self._configuration.applies_to_all:
            return modules[DEFAULT_MODULE]
        for each in (name, *_STAND_INS.get(name, ()), DEFAULT_MODULE):
            if each in modules:
                return modules[each]
        stacks = {stack.module for stack in self._donor.stacks}
        if len(modules) == 1 and (len(stacks) == 1 or name not in stacks):
            return next(iter(modules.values()))
        raise RecipeError(
            f"modules has {', '.join(modules)}, but {self._donor.reference} has a part {name}",
            f"Add {name} to modules.",
        )

    def _stack(self, source: Source, module: str) -> Stack:
        found = self._models[source.model].stack(module)
        if found is None:
            raise RecipeError(
                f"{source.model} has no layers in {module}, but {self._donor.reference} has",
                "Merge models of one architecture.",
            )
        return found

    def _ranges(self, part: Slice, module: str) -> list[tuple[Stack, int, int]]:
        """For each source: the stack, the first layer, and the end of the range."""
        ranges = []
        for source in part.sources:
            stack = self._stack(source, module)
            first, end = source.layers or (0, stack.count)
            if end > stack.count:
                raise RecipeError(
                    f"layer_range is [{first}, {end}], but {source.model} has {stack.count} layers",
                    f"The end can be at most {stack.count}.",
                )
            ranges.append((stack, first, end))
        if len({end - first for _, first, end in ranges}) > 1:
            counts = ", ".join(
                f"{end} in {source.model}" for source, (_, _, end) in zip(part.sources, ranges, strict=True)
            )
            raise RecipeError(f"The models have different numbers of layers: {counts}", "Choose layers with slices:.")
        return ranges

    def _in_layers(self, target: Stack, module: ConfiguredModule) -> Iterator[Slot]:
        before = 0
        for part in module.slices:
            ranges = self._ranges(part, target.module)
            length = ranges[0][2] - ranges[0][1]
            for layer in range(length):
                depth = depth_of(layer, length)
                own = [(stack, first + layer) for stack, first, _ in ranges]
                for names in self._names_of(part, own, target, before + layer):
                    yield self._slot(names[0], module, part, depth, names[1:])
            if part.sources[0].layers is None:
                yield from self._beyond(part, module, target, length)
            before += length

    def _names_of(
        self, part: Slice, own: Sequence[tuple[Stack, int]], target: Stack, layer: int
    ) -> Iterator[tuple[str, ...]]:
        """For each tensor of one layer, its name in the output and in each source."""
        seen = dict[str, None]()
        for source, (stack, number) in zip(part.sources, own, strict=True):
            for name in self._by_layer(source.model, stack).get(number, ()):
                seen.setdefault(target.renamed(target.prefix + name.removeprefix(stack.prefix), layer))
        for name in seen:
            yield (
                name,
                *(stack.renamed(stack.prefix + name.removeprefix(target.prefix), number) for stack, number in own),
            )

    def _by_layer(self, model: Reference, stack: Stack) -> Mapping[int, Sequence[str]]:
        key = (model, stack.prefix)
        if key not in self._layers:
            found = dict[int, list[str]]()
            checkpoint = self._models[model].checkpoint
            for name in (*checkpoint, *checkpoint.aliases):
                number = stack.layer_of(name)
                if number is not None:
                    found.setdefault(number, []).append(name)
            self._layers[key] = found
        return self._layers[key]

    def _beyond(self, part: Slice, module: ConfiguredModule, target: Stack, length: int) -> Iterator[Slot]:
        """Tensors of layers after those that config.json counts, for multi-token prediction."""
        for source in part.sources:
            stack = self._stack(source, target.module)
            for number, names in sorted(self._by_layer(source.model, stack).items()):
                if number >= length and source is part.sources[0]:
                    for name in names:
                        yield self._slot(name, module, part, 1.0, (name,) * len(part.sources))

    def _outside(self) -> Iterator[Slot]:
        """Tensors before the layers, from the first slice's models, and after them, from the last slice's models."""
        done = set[str]()
        for name, module in self._outside_names():
            if name in done:
                continue
            done.add(name)
            part = module.slices[0 if comes_first(name) else -1]
            yield self._slot(name, module, part, 0.0, (name,) * len(part.sources))

    def _outside_names(self) -> Iterator[tuple[str, ConfiguredModule]]:
        configuration = self._configuration
        parts = [part for module in configuration.modules.values() for part in (module.slices[0], module.slices[-1])]
        models = dict.fromkeys(source.model for part in parts for source in part.sources)
        for reference in dict.fromkeys((self._donor.reference, *models)):
            model = self._models[reference]
            for name in (*model.checkpoint, *model.checkpoint.aliases):
                if all(stack.layer_of(name) is None for stack in model.stacks):
                    module = self._module(module_of(name, model.stacks) if model.stacks else DEFAULT_MODULE)
                    part = module.slices[0 if comes_first(name) else -1]
                    if reference in [source.model for source in part.sources]:
                        yield name, module

    def _slot(self, name: str, module: ConfiguredModule, part: Slice, depth: float, names: tuple[str, ...]) -> Slot:
        for source, own in zip(part.sources, names, strict=True):
            self._taken.setdefault(source.model, set()).add(own)
        return Slot(name, module, part, depth, names)

    def _origins(self, target: Stack, module: ConfiguredModule) -> Iterator[tuple[Stack, OpenModel, int]]:
        """For each layer of the output, its source for config.json: the base, else the first source."""
        for part in module.slices:
            base = self._configuration.base_of(part)
            place = next((number for number, source in enumerate(part.sources) if source.model == base), 0)
            stack, first, end = self._ranges(part, target.module)[place]
            model = self._models[part.sources[place].model]
            yield from ((stack, model, layer) for layer in range(first, end))

    def _left_out(self) -> dict[Reference, tuple[str, ...]]:
        left = dict[Reference, tuple[str, ...]]()
        for reference, taken in self._taken.items():
            checkpoint = self._models[reference].checkpoint
            names = tuple(name for name in checkpoint if name not in taken)
            if names:
                left[reference] = names
        return left
