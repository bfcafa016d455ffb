"""Summarize the outcome of a merge in a few sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from modelfuse.inspection.diff_result import Diff
from modelfuse.inspection.merge_outcome import MergeOutcome, ModelOutcome

#: Parts of a model whose projection is below this share of the whole model's are reported.
UNEVEN = 0.6
#: The least share that is reported.
LEAST = 0.02


def sentences_of(
    names: Sequence[str],
    whole: MergeOutcome,
    modules: Sequence[MergeOutcome],
    layers: Sequence[MergeOutcome],
    diff: Diff,
) -> Iterator[str]:
    """The sentences.

    Args:
        names: The names of the models, then of the output.
        whole: The outcome in all tensors.
        modules: The outcomes by kind of module.
        layers: The outcomes by layer.
        diff: The comparison.
    """
    if whole.nonfinite:
        yield f"{whole.nonfinite:,} elements of the output are NaN or infinite."
    sizes = [each.relative for each in diff.whole.models[:-1] if each.relative is not None]
    if whole.relative is not None and sizes:
        yield (
            f"The output is {_percent(whole.relative)} of the base's norm away from the base; the models are "
            f"{_range(sizes)}."
        )
    if not diff.base_given:
        yield f"There was no base: differences are taken to the first model, {diff.base}."
    for name, taken in zip(names, whole.models, strict=False):
        yield from _of_model(name, taken)
    for name, number in zip(names, range(len(whole.models)), strict=False):
        yield from _least(name, number, whole, modules, layers)
    if whole.residual is not None:
        yield (
            f"{_percent(whole.residual)} of the norm of the output's difference is not a weighted sum of the "
            "models' differences: elements were dropped, outvoted or rounded."
        )
    if whole.cancelled is not None and whole.cancelled >= LEAST:
        yield f"The models' contributions cancel {_percent(whole.cancelled)} of the sum of their squares."


def _of_model(name: str, taken: ModelOutcome) -> Iterator[str]:
    if taken.projection is None:
        yield f"{name} equals the base: it contributes nothing."
        return
    parts = [f"{taken.projection:.2f} times its difference is in the output"]
    if taken.coefficient is not None and abs(taken.coefficient - taken.projection) >= LEAST:
        parts[0] += (
            f", {taken.coefficient:.2f} by its own weight and the rest through what other models have in common with it"
        )
    if taken.dropped is not None and taken.dropped >= LEAST:
        parts.append(f"{_percent(taken.dropped)} of the elements that it changes equal the base")
    if taken.reversed is not None and taken.reversed >= LEAST:
        parts.append(f"{_percent(taken.reversed)} of those that both change have the opposite sign")
    yield f"{name}: {'; '.join(parts)}."


def _least(
    name: str, number: int, whole: MergeOutcome, modules: Sequence[MergeOutcome], layers: Sequence[MergeOutcome]
) -> Iterator[str]:
    """The part of a model of which the output contains least, if clearly less than of the rest."""
    usual = whole.models[number].projection
    if usual is None or usual <= 0:
        return
    for groups in (modules, layers):
        known = [(each.models[number].projection, each.name) for each in groups]
        found = min(((value, where) for value, where in known if value is not None), default=None)
        if found is not None and found[0] < UNEVEN * usual:
            yield f"Least of {name} is in {found[1]}: {found[0]:.2f} times its difference there."


def _range(shares: Sequence[float]) -> str:
    least, most = _percent(min(shares)), _percent(max(shares))
    return least if least == most else f"{least} to {most}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.2g} %"
