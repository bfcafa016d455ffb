"""Suggest settings from measured differences. Each rule was tested on models that it was not derived from.

``docs/diff.md`` has the tests and their results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from msgspec import structs

from modelfuse.inspection.diff_measures import Suggestion
from modelfuse.inspection.diff_result import Diff

#: The norm that the merged difference of a weighted sum should have, relative to the base's.
SHARE = 0.1
#: The least ratio of the suggested weights to the average's (or its inverse) that is reported.
LEAST_CHANGE = 1.25
#: The number of models from which ridge was better than any equal weights.
SEVERAL = 3


def advice_of(diff: Diff, adapters: bool) -> tuple[Suggestion, ...]:
    """The suggestions; none where no rule applies, as for models without a common base.

    Args:
        diff: The comparison.
        adapters: Whether any of the models is an adapter.
    """
    changed = [each for each in diff.whole.models if each.norm > 0]
    fatal = any(each.fatal for each in diff.side_differences)
    if not diff.base_given or fatal or len(changed) < len(diff.models) or len(diff.models) < 2:
        return ()
    return (*_scaling(diff), *(() if adapters else _solving(diff)))


def advice_after(diff: Diff, settings: Mapping[str, object], adapters: bool) -> tuple[Suggestion, ...]:
    """The suggestions for the inputs of a merge, without what it did.

    Args:
        diff: The comparison, in which the last model is the output.
        settings: The settings of the merge.
        adapters: Whether any of the models is an adapter.
    """
    count, whole = len(diff.models) - 1, diff.whole
    pairs = tuple(each for each in whole.pairs if count not in (each.model, each.other))
    inputs = replace(
        diff,
        models=diff.models[:-1],
        whole=structs.replace(whole, models=whole.models[:-1], pairs=pairs),
        side_differences=tuple(each for each in diff.side_differences if each.model < count),
    )
    return tuple(each for each in advice_of(inputs, adapters) if not _was_done(each, settings))


def _was_done(advice: Suggestion, settings: Mapping[str, object]) -> bool:
    """Whether a merge had the suggested method and, where these matter, about the suggested weights."""
    weights, used = advice.settings.get("weight_list"), settings.get("weight_list")
    if settings.get("merge_method") != advice.settings["merge_method"]:
        return False
    if not isinstance(weights, list) or not isinstance(used, list):
        return weights is None
    ratios = [one / other if other else 0.0 for one, other in zip(weights, used, strict=True)]
    return all(1 / LEAST_CHANGE < ratio < LEAST_CHANGE for ratio in ratios)


def _scaling(diff: Diff) -> Iterator[Suggestion]:
    """Weights of a weighted sum: an average keeps too little of experts whose differences are small."""
    count, size = len(diff.models), _size_of_sum(diff)
    weight = round(min(1.0, SHARE / size), 2) if size else 1.0
    if max(weight * count, 1 / (weight * count)) < LEAST_CHANGE:
        return
    yield Suggestion(
        f"The sum of all differences has {100 * size:.2g} % of the base's norm: add them with the weight {weight:g} "
        "each" + (f" instead of {1 / count:.2g}." if weight < 1 else ", as they are small enough."),
        {"merge_method": "task_arithmetic", "weight_list": [weight] * count},
    )


def _solving(diff: Diff) -> Iterator[Suggestion]:
    """A method that minimizes interference, if several experts (no adapters) act on each other's inputs."""
    if len(diff.models) >= SEVERAL and any(each.interference for each in diff.whole.pairs):
        yield Suggestion(
            f"{len(diff.models)} models act on each other's inputs: ridge minimizes the interference. Of fully "
            "fine-tuned experts it kept more than any equal weights; of LoRAs it kept less.",
            {"merge_method": "ridge"},
        )


def _size_of_sum(diff: Diff) -> float:
    """‖Στ‖ / ‖b‖; zero if ‖b‖ is zero."""
    norms = [each.norm for each in diff.whole.models]
    square = sum(norm * norm for norm in norms)
    square += sum((each.cosine or 0.0) * norms[each.model] * norms[each.other] for each in diff.whole.pairs)
    return float(max(square, 0.0) ** 0.5 / diff.whole.base_norm) if diff.whole.base_norm else 0.0
