"""Which tensors of several checkpoints are the same one: by name, and by what is tied to what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.checkpoints.tensor_names import EMBEDDINGS, HEADS, group_names
from modelfuse.checkpoints.ties import TIED_CLASSES, says_tied
from modelfuse.errors import MismatchError
from modelfuse.storage import Place

#: The numbers of the models that must have a tensor of the output, by its name.
InputsOf = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Tied:
    """A name of some input's tensor that the output leaves out.

    Attributes:
        name: The name.
        other: The tensor whose values it shares, which the output has.
    """

    name: str
    other: str


@dataclass(frozen=True, slots=True)
class EqualPair:
    """Two tensors that must be equal: tied ones of a model, or an adapter's copy of one of its base's and that one.

    Attributes:
        one: A tensor.
        other: The other.
        path: The model that ties them, or the adapter.
        tied: Whether the model ties them.
    """

    one: StoredTensor
    other: StoredTensor
    path: Place
    tied: bool


def find_equal_pairs(models: Sequence[Checkpoint], tied: Sequence[Tied]) -> tuple[EqualPair, ...]:
    """The tied tensors of every model that has both; a difference on one of them changes both."""
    pairs = ((model, model.tensors.get(each.name), model.tensors.get(each.other)) for each in tied for model in models)
    return tuple(
        EqualPair(one, other, model.path, True)
        for model, one, other in pairs
        if one is not None and other is not None and not (one.is_delta or other.is_delta)
    )


def match_tensors(
    models: Sequence[Checkpoint], reference: Checkpoint, inputs_of: InputsOf
) -> tuple[list[str], tuple[Tied, ...]]:
    """Match the models' tensors by name.

    Args:
        models: All checkpoints, the base included.
        reference: The one whose order of tensors the output keeps.
        inputs_of: The numbers of the models that must have a tensor of the output.

    Returns:
        The names of the output's tensors, and the names that are left out because they are tied.

    Raises:
        MismatchError: If a tensor is not in every model that must have it, or has different shapes; lists all.
    """
    everywhere = set.intersection(*(_names(model) for model in models))
    groups = [_tied_groups(model) for model in models]
    union = list(dict.fromkeys(name for model in (reference, *models) for name in (*model, *model.aliases)))
    order = {name: number for number, name in enumerate(union)}
    names, tied, missing = [], [], []
    for name in union:
        holders = [group.get(name, set()) for model, group in zip(models, groups, strict=True) if _has(model, name)]
        partners = set.intersection(*holders) & everywhere
        kept = min(partners, key=lambda each: (each.endswith(HEADS), not each.endswith(EMBEDDINGS), order[each]),
                   default=name)  # fmt: skip
        if kept != name:
            tied.append(Tied(name, kept))
        elif name in everywhere or all(_has(models[number], name) for number in inputs_of(name)):
            names.append(name)
        else:
            missing.append(name)
    problems = [
        *_describe_missing(missing, models, inputs_of), *_describe_shapes(names, models, inputs_of),
        *_describe_untied(tied, models),
    ]  # fmt: skip
    if not names and not problems:
        raise MismatchError("The models have no tensors to merge", "Name the folders that hold the weights.")
    if problems:
        raise MismatchError(
            "The models do not have the same tensors:\n" + "\n".join(f"  {problem}" for problem in problems),
            "Merge models that were fine-tuned from one base, without added tokens or layers.",
        )
    return names, tuple(tied)


def _names(model: Checkpoint) -> set[str]:
    return {*model, *model.aliases}


def _has(model: Checkpoint, name: str) -> bool:
    return name in model.tensors or name in model.aliases


def _tied_groups(model: Checkpoint) -> dict[str, set[str]]:
    """For every name that shares its values with others in one model: all names of the group."""
    members: dict[str, set[str]] = {}
    ties = says_tied(model.config)
    if ties is None and model.config.get("model_type") in TIED_CLASSES:
        ties = True
    for alias, kept in model.aliases.items():
        if ties is False and alias.endswith(HEADS):
            continue  # A loader will want both, though they were equal when they were saved.
        members.setdefault(kept, {kept}).add(alias)
    if ties is True:
        embeddings = [name for name in model if name.endswith(EMBEDDINGS)]
        heads = [name for name in model if name.endswith(HEADS)]
        if len(embeddings) == 1:
            members.setdefault(embeddings[0], {embeddings[0]}).update(heads)
    return {name: group for group in members.values() for name in group}


def _describe_missing(missing: Sequence[str], models: Sequence[Checkpoint], inputs_of: InputsOf) -> list[str]:
    lines: dict[tuple[str, ...], list[str]] = {}
    for name in missing:
        absent = tuple(str(models[number].path) for number in inputs_of(name) if not _has(models[number], name))
        lines.setdefault(absent, []).append(name)
    return [
        f"not in {' and '.join(absent)}: {group}" for absent, names in lines.items() for group in group_names(names)
    ]


def _describe_shapes(names: Sequence[str], models: Sequence[Checkpoint], inputs_of: InputsOf) -> list[str]:
    lines: dict[str, list[str]] = {}
    for name in names:
        holders = [models[number] for number in inputs_of(name)]
        shapes = [model.tensors[model.aliases.get(name, name)].shape for model in holders]
        if len(set(shapes)) > 1:
            shown = ", ".join(f"{list(shape)} in {model.path}" for shape, model in zip(shapes, holders, strict=True))
            lines.setdefault(shown, []).append(name)
    return [f"{group} has the shapes {shown}" for shown, names in lines.items() for group in group_names(names)]


def _describe_untied(tied: Sequence[Tied], models: Sequence[Checkpoint]) -> list[str]:
    """Pairs that config.json ties although they cannot share their values."""
    lines = []
    for pair in tied:
        for model in models:
            one, other = model.tensors.get(pair.name), model.tensors.get(pair.other)
            if one is None or other is None or one.is_delta or other.is_delta:
                continue
            if (one.shape, one.dtype) != (other.shape, other.dtype):
                lines.append(
                    f"config.json of {model.path} ties {one.name} to {other.name}, but one is {one.dtype} "
                    f"{list(one.shape)} and the other {other.dtype} {list(other.shape)}"
                )
    return lines
