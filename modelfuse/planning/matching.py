"""Match the tensors of several checkpoints, by name and by ties."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from msgspec import Struct

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.checkpoints.tensor_names import EMBEDDINGS, HEADS, group_names
from modelfuse.checkpoints.ties import is_tied_class, says_tied
from modelfuse.errors import MismatchError
from modelfuse.planning.mismatch import InputsOf, Mismatch
from modelfuse.recipe.missing import MissingRule, policy_of
from modelfuse.storage import PathOrUrl


class Tied(Struct, frozen=True):
    """A tensor name that the output leaves out because its values are another tensor's.

    Attributes:
        name: The name.
        other: The tensor with the same values, which the output contains.
    """

    name: str
    other: str


class EqualPair(Struct, frozen=True):
    """Two tensors that must be equal: tied tensors of a model, or an adapter's copy of a base tensor and the original.

    Attributes:
        one: The first tensor.
        other: The second tensor.
        path: The model or adapter.
        tied: Whether the model ties them.
    """

    one: StoredTensor
    other: StoredTensor
    path: PathOrUrl
    tied: bool


def find_equal_pairs(models: Sequence[Checkpoint], tied: Sequence[Tied]) -> tuple[EqualPair, ...]:
    """The tied pairs of every model that stores both tensors; an adapter's difference on one applies to both."""
    pairs = ((model, model.tensors.get(each.name), model.tensors.get(each.other)) for each in tied for model in models)
    return tuple(
        EqualPair(one, other, model.path, True)
        for model, one, other in pairs
        if one is not None and other is not None and not (one.is_delta or other.is_delta)
    )


class Match(NamedTuple):
    """The tensors of the output.

    Attributes:
        names: Their names.
        tied: Names that are left out because they are tied.
        partial: For tensors that not all models have, the indices of the inputs to use.
        dropped: Names that are left out because not all models have them.
        alone: Names in ``partial`` that the base has, too, but whose base tensor is not used.
    """

    names: list[str]
    tied: tuple[Tied, ...]
    partial: Mapping[str, tuple[int, ...]]
    dropped: tuple[str, ...]
    alone: frozenset[str] = frozenset()


def match_tensors(
    models: Sequence[Checkpoint], has_base: bool, inputs_of: InputsOf, rules: tuple[MissingRule, ...] = (),
    alone: Collection[str] = (),
) -> Match:  # fmt: skip
    """Match the models' tensors by name.

    Args:
        models: The models in order, then the base if there is one. The output keeps the base's order of tensors, else
            the first one's.
        has_base: Whether there is a base.
        inputs_of: Gives the indices of the models that must have a tensor, by its name.
        rules: What to do with tensors that only some of these models have.
        alone: Names of tensors whose base tensor is not used.

    Raises:
        MismatchError: If a tensor is not in every model that must have it, or has different shapes; lists all.
    """
    match, mismatch = find_matches(models, has_base, inputs_of, rules, alone)
    if mismatch.missing or mismatch.misshapen or mismatch.untied:
        raise mismatch.error()
    if not match.names:
        raise MismatchError("The models have no tensors to merge", "Name the folders that hold the weights.")
    return match


def find_matches(
    models: Sequence[Checkpoint], has_base: bool, inputs_of: InputsOf, rules: tuple[MissingRule, ...] = (),
    alone: Collection[str] = (),
) -> tuple[Match, Mismatch]:  # fmt: skip
    """Match the models' tensors by name, and return the mismatches instead of raising an error."""
    everywhere = set.intersection(*(_names(model) for model in models))
    groups = [_tied_groups(model) for model in models]
    base = len(models) - 1
    in_order = (models[base if has_base else 0], *models)
    union = list(dict.fromkeys(name for model in in_order for name in (*model, *model.aliases)))
    order = {name: number for number, name in enumerate(union)}
    names, tied, missing, dropped = [], [], [], []
    partial: dict[str, tuple[int, ...]] = {}
    for name in union:
        holders = [group.get(name, set()) for model, group in zip(models, groups, strict=True) if model.has(name)]
        partners = set.intersection(*holders) & everywhere
        kept = min(partners, key=lambda each: (each.endswith(HEADS), not each.endswith(EMBEDDINGS), order[each]),
                   default=name)  # fmt: skip
        policy = policy_of(rules, name) if rules else "error"
        if kept != name:
            tied.append(Tied(name, kept))
        elif name in alone:
            names.append(name)
            partial[name] = tuple(range(base))
        elif name in everywhere or all(models[number].has(name) for number in inputs_of(name)):
            names.append(name)
        elif policy == "error":
            missing.append(name)
        elif policy == "drop":
            dropped.append(name)
        else:
            names.append(name)
            own = tuple(number for number in range(len(models)) if models[number].has(name))
            partial[name] = (base,) if has_base and base in own else own

    def wanted(name: str) -> tuple[int, ...]:
        return partial.get(name) or inputs_of(name)

    misshapen = [name for name in names if len({models[number].resolve(name).shape for number in wanted(name)}) > 1]
    mismatch = Mismatch(models, missing, misshapen, _describe_untied(tied, models), wanted)
    return Match(names, tuple(tied), partial, tuple(dropped), frozenset(alone)), mismatch


def _names(model: Checkpoint) -> set[str]:
    return {*model, *model.aliases}


def _tied_groups(model: Checkpoint) -> dict[str, set[str]]:
    """For every name in a model that shares its values with others, all names of its group."""
    members: dict[str, set[str]] = {}
    ties = says_tied(model.config)
    if ties is None and is_tied_class(model.config):
        ties = True
    for alias, kept in model.aliases.items():
        if ties is False and alias.endswith(HEADS):
            continue  # Loaders expect both tensors, though they were equal when the model was saved.
        members.setdefault(kept, {kept}).add(alias)
    if ties is True:
        embeddings = [name for name in model if name.endswith(EMBEDDINGS)]
        heads = [name for name in model if name.endswith(HEADS)]
        if len(embeddings) == 1:
            members.setdefault(embeddings[0], {embeddings[0]}).update(heads)
    return {name: group for group in members.values() for name in group}


def _describe_untied(tied: Sequence[Tied], models: Sequence[Checkpoint]) -> list[str]:
    """Pairs that config.json ties, but that differ in shape or dtype."""
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


def notes_on_missing(inputs: Sequence[object], match: Match) -> Iterator[str]:
    """Notes on tensors that only some inputs have; ``inputs`` are the inputs' names."""
    if match.dropped:
        yield f"Left out, as only some models have them: {', '.join(group_names(match.dropped))}."
    if match.alone:
        yield (
            "The number of rows differs from the base's, so the base's tensor is not used: "
            f"{', '.join(sorted(match.alone))}."
        )
    copied: dict[tuple[int, ...], list[str]] = {}
    for name, numbers in match.partial.items():
        if name in match.alone:
            continue
        copied.setdefault(numbers, []).append(name)
    for numbers, names in copied.items():
        owners = " and ".join(str(inputs[number]) for number in numbers)
        how = "merged from" if len(numbers) > 1 else "taken from"
        yield f"Not in all models, {how} {owners}: {', '.join(group_names(names))}."
