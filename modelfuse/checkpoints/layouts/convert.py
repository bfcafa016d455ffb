"""Convert inputs to one layout: names mapped, weights transposed, split or fused, as views."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.checkpoints.layouts.detect import ASK, kinds_of
from modelfuse.checkpoints.layouts.paddleformers import ARCHITECTURES, Stated, stated
from modelfuse.checkpoints.layouts.tables import (
    EMBEDDING_MODULES,
    FUSED,
    HEAD,
    LINEAR,
    PARTS,
    WORDS,
    Fusion,
    Geometry,
    Kind,
    Layout,
    geometry_of,
    layout_of,
    module_of,
    usual_layout,
)
from modelfuse.checkpoints.tensor_names import group_names
from modelfuse.errors import MismatchError
from modelfuse.recipe.recipe import Recipe

#: Shapes by name.
Shapes = Mapping[str, tuple[int, ...]]


def bring_together(models: Sequence[Checkpoint], recipe: Recipe) -> tuple[Checkpoint, ...]:
    """The inputs, converted to the output's layout; their attribute ``layout`` has the original one.

    The output has the layout of the base, else of the first model, unless the recipe says otherwise. Nothing is
    read or copied: weights become views of the same files.

    Raises:
        MismatchError: If an input's layout, or the conversion of a tensor, is ambiguous.
    """
    reference = recipe.reference
    geometry = geometry_of((models[reference], *models))
    declared = recipe.declared_layouts(tuple(model.kind for model in models))
    kinds = kinds_of(models, declared, geometry)
    wanted = recipe.output_layout or kinds[reference]
    if wanted is None:
        return tuple(models)
    if None in kinds:
        raise MismatchError(
            f"The layout of {models[reference].path} cannot be known, so that it cannot be stored in {WORDS[wanted]}",
            ASK,
        )
    layouts = [layout_of(model, kind, geometry) for model, kind in zip(models, kinds, strict=True) if kind is not None]
    same = [number for number, layout in enumerate(layouts) if layout.kind == wanted]
    # If the kind is the reference's own, its names are kept, as its loaders expect them.
    target = layouts[reference] if layouts[reference].kind == wanted else usual_layout(wanted, geometry)
    if not same:
        _check_names(models[reference], wanted, geometry)
    references = {name: tensor.shape for number in same for name, tensor in models[number].items()}
    return tuple(
        replace(Relayout(model, own, target, geometry, references).convert(), layout=own.kind)
        for model, own in zip(models, layouts, strict=True)
    )


def _check_names(model: Checkpoint, wanted: Kind, geometry: Geometry) -> None:
    """Check that names in the wanted layout are known, if no input has it."""
    if geometry.architecture in ARCHITECTURES:
        return
    strange = [name for name in model if module_of(name) in (FUSED if wanted == "hf" else PARTS)]
    if strange:
        raise MismatchError(
            f"{model.path}: the names of architecture {geometry.architecture or 'unknown'} in {WORDS[wanted]} are not "
            f"known, such as that of {strange[0]}",
            f"Known are {', '.join(ARCHITECTURES)}; a model in that layout beside it would show the names of others.",
        )


@dataclass
class Relayout:
    """The conversion of one checkpoint to another layout.

    Attributes:
        model: The checkpoint.
        own: Its layout.
        target: The layout to convert to.
        geometry: The sizes that determine how fused weights are split.
        references: Shapes of tensors of other models that are in the target's kind: they tell which weights of
            names that no table knows are transposed.
    """

    model: Checkpoint
    own: Layout
    target: Layout
    geometry: Geometry
    references: Shapes
    _stated: Stated | None = field(init=False)
    _waiting: dict[tuple[str, Fusion], list[StoredTensor]] = field(default_factory=dict)
    _undecided: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stated = stated(self.geometry.architecture, self.geometry.layers)

    def convert(self) -> Checkpoint:
        """The checkpoint in the target's layout."""
        if self.own == self.target:
            return self.model
        # An alias of a weight that is split becomes a tensor of its own; others stay aliases.
        model = self.model
        split = {alias for alias in model.aliases if module_of(alias) in {**FUSED, **PARTS}}
        everything = [*model.values(), *(replace(model[model.aliases[alias]], name=alias) for alias in sorted(split))]
        made = [each for tensor in everything for each in self._convert(tensor)]
        made += [tensor for parts in self._waiting.values() for tensor in parts]  # Told as missing names later.
        named = [replace(tensor, name=self.target.theirs(tensor.name)) for tensor in made]
        tensors = {tensor.name: tensor for tensor in named}
        if self._undecided:
            raise MismatchError(
                f"{self.model.path} is in {WORDS[self.own.kind]}; whether these weights change in "
                f"{WORDS[self.target.kind]} cannot be known:\n"
                + "\n".join(f"  {group}" for group in group_names(self._undecided)),
                "Save all models in one layout first, with the library that wrote them.",
            )
        names = {alias: name for alias, name in model.aliases.items() if alias not in split}
        rename = {name: self.target.theirs(self.own.ours(name)) for pair in names.items() for name in pair}
        aliases = {rename[alias]: rename[name] for alias, name in names.items()}
        return replace(model, tensors=tensors, aliases=aliases)

    def _convert(self, tensor: StoredTensor) -> Iterator[StoredTensor]:
        """A tensor in its new order, named as Hugging Face does: none while it waits for others, or several."""
        tensor = replace(tensor, name=self.own.ours(tensor.name))
        module = module_of(tensor.name)
        is_layer = len(tensor.shape) in (1, 2) and self._is_shared(tensor.name)
        fusion = FUSED.get(module) if is_layer and module in self.own.fused else None
        if fusion is not None:
            fused = self._fused(fusion)
            if fused is None:
                yield from self._take_apart(tensor, module, fusion)
                return
            tensor = replace(tensor, name=_with_module(tensor.name, module, fused))
        tensor = self._turn(tensor)
        into = PARTS.get(module)
        if into is not None and is_layer and self._fused(into) is not None:
            yield from self._fuse(tensor, module, into)
        else:
            yield tensor

    def _is_shared(self, name: str) -> bool:
        """Whether Paddle keeps it fused: not all that is called like a part of a fused layer is one."""
        known = self.target.stated or self.own.stated or self._stated
        module = module_of(name)
        first = FUSED[module].parts[0] if module in FUSED else module
        weight = None if known is None else known.weight(_with_module(name, module, first))
        return weight is not None and weight.parts > 1

    def _fused(self, fusion: Fusion) -> str | None:
        """The target's name of the fused layer; None if it is not fused there."""
        return next((name for name in fusion.names if name in self.target.fused), None)

    def _turn(self, tensor: StoredTensor) -> StoredTensor:
        """The tensor, transposed if the target stores it so."""
        module, shape = module_of(tensor.name), tensor.shape
        one, two = self._stated_turn(self.own, tensor.name), self._stated_turn(self.target, tensor.name)
        if module == HEAD:
            turns = self.own.head != self.target.head
        elif one is not None and two is not None:
            turns = one != two
        elif self.own.kind == self.target.kind or module in EMBEDDING_MODULES:
            turns = False
        else:
            turns = module in LINEAR or self._turns_unknown(tensor)
        if not turns or len(shape) != 2:
            return tensor
        return _part(tensor, self.own.kind if module != HEAD else self.own.head, True, 1, 0, None)

    @staticmethod
    def _stated_turn(layout: Layout, name: str) -> bool | None:
        """Whether a layout has a weight transposed; None if that is not stated."""
        weight = layout.stated.weight(name) if layout.stated is not None else None
        return weight.turned if weight is not None else None if layout.kind == "paddle" else False

    def _turns_unknown(self, tensor: StoredTensor) -> bool:
        if len(tensor.shape) < 2:
            return False
        shape, there = tensor.shape, self.references.get(self.target.theirs(tensor.name))
        if there is None or (shape == there == shape[::-1]):
            self._undecided.append(tensor.name)
        return there is not None and there == shape[::-1] != shape and len(shape) == 2

    def _take_apart(self, tensor: StoredTensor, module: str, fusion: Fusion) -> Iterator[StoredTensor]:
        turns = self.own.kind != self.target.kind
        groups, widths = self._cuts(tensor, fusion)
        begin = 0
        for part, width in zip(fusion.parts, widths, strict=True):
            piece = _part(tensor, self.own.kind, turns, groups, begin, width)
            yield replace(piece, name=_with_module(tensor.name, module, part))
            begin += width

    def _cuts(self, tensor: StoredTensor, fusion: Fusion) -> tuple[int, tuple[int, ...]]:
        """The number of groups of a fused layer's outputs, and the widths of its parts in each."""
        outputs = tensor.shape[0 if self.own.kind == "hf" else -1] if tensor.shape else 0
        groups, shares = (self._groups(), self._shares()) if fusion.by_head else (1, (1,) * len(fusion.parts))
        unit, rest = divmod(outputs, groups * sum(shares))
        if rest:
            raise MismatchError(
                f"{self.model.path}: {tensor.name} has {outputs} outputs, which cannot be cut into "
                f"{' and '.join(fusion.parts)} as config.json has it: {self._heads()}"
            )
        return groups, tuple(share * unit for share in shares)

    def _groups(self) -> int:
        heads, groups = self.geometry.heads, self.geometry.key_value_heads
        if heads is None or groups is None or heads % groups:
            raise MismatchError(
                f"{self.model.path} keeps queries, keys and values fused, but config.json does not tell where to cut "
                f"them: {self._heads()}",
                "Put the config.json of the model beside its weights.",
            )
        return groups

    def _shares(self) -> tuple[int, ...]:
        return (self.geometry.heads or 0) // self._groups(), 1, 1

    def _heads(self) -> str:
        return f"num_attention_heads is {self.geometry.heads}, num_key_value_heads is {self.geometry.key_value_heads}"

    def _fuse(self, tensor: StoredTensor, module: str, fusion: Fusion) -> Iterator[StoredTensor]:
        name = _with_module(tensor.name, module, self._fused(fusion) or "")
        parts = self._waiting.setdefault((name, fusion), [])
        parts.append(tensor)
        if len(parts) == len(fusion.parts):
            del self._waiting[name, fusion]
            order = fusion.parts.index
            yield self._weave(name, fusion, sorted(parts, key=lambda part: order(module_of(part.name))))

    def _weave(self, name: str, fusion: Fusion, parts: Sequence[StoredTensor]) -> StoredTensor:
        groups = self._groups() if fusion.by_head else 1
        axis = 0 if self.target.kind == "hf" or len(parts[0].shape) == 1 else 1
        others = {(part.dtype, part.shape[:axis], part.shape[axis + 1 :]) for part in parts}
        if len(others) > 1 or any(part.shape[axis] % groups for part in parts):
            raise MismatchError(
                f"{self.model.path}: {' and '.join(part.name for part in parts)} cannot be fused to {name}: they are "
                + ", ".join(f"{part.dtype} {list(part.shape)}" for part in parts)
            )
        from modelfuse.checkpoints.views.rearranged import WovenTensor

        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        rows = groups * (parts[0].shape[0] if axis else 1)
        first = parts[0]
        return WovenTensor(name, first.dtype, tuple(shape), first.file, first.offset, tuple(parts), rows)


def _with_module(name: str, old: str, new: str) -> str:
    head, _, parameter = name.rpartition(".")
    return f"{head.removesuffix(old)}{new}.{parameter}"


def _part(tensor: StoredTensor, kind: Kind, turns: bool, groups: int, begin: int, width: int | None) -> StoredTensor:
    """A slice of the outputs of a weight or bias, in each group from ``begin`` on; transposed if ``turns``."""
    from modelfuse.checkpoints.views.rearranged import view

    *_, columns = tensor.shape
    if len(tensor.shape) == 1:
        outputs, out_step, inputs, in_step = columns, 1, None, 0
    elif kind == "hf":
        outputs, out_step, inputs, in_step = tensor.shape[0], columns, columns, 1
    else:
        outputs, out_step, inputs, in_step = columns, 1, tensor.shape[0], columns
    width = outputs // groups if width is None else width
    dims, steps, shape = [groups, width], [outputs // groups * out_step, out_step], [groups * width]
    if inputs is not None:
        position = 0 if (kind == "hf") == turns else len(dims)
        dims.insert(position, inputs)
        steps.insert(position, in_step)
        shape.insert(min(position, 1), inputs)
    return view(tensor, tuple(shape), tuple(dims), tuple(steps), begin * out_step)
