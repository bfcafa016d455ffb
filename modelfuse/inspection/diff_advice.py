"""Settings worth trying, by what differences look like. Each rule was tested on models that it was not made from.

``docs/diff.md`` has the tests and their numbers; ``SHARE`` was chosen on other models than those that it is tested on.
"""

from __future__ import annotations

from collections.abc import Iterator

from modelfuse.inspection.diff_measures import Advice
from modelfuse.inspection.diff_result import Diff

#: How large the merged difference of a weighted sum is to be, relative to the base.
SHARE = 0.1
#: Weights that are nearer to the average's than this are not worth a word.
LEAST_CHANGE = 1.25
#: Models from which on solving for all of them at once was better than any weights.
SEVERAL = 3


def advice_of(diff: Diff, adapters: bool) -> tuple[Advice, ...]:
    """What to try; nothing where the rules say nothing, as for models without a common base.

    Args:
        diff: What was found.
        adapters: Whether any of the models is an adapter.
    """
    changed = [each for each in diff.whole.models if each.norm > 0]
    fatal = any(each.fatal for each in diff.side_differences)
    if not diff.base_given or fatal or len(changed) < len(diff.models) or len(diff.models) < 2:
        return ()
    return (*_scaling(diff), *(() if adapters else _solving(diff)))


def _scaling(diff: Diff) -> Iterator[Advice]:
    """Weights of a sum: the average of experts that were tuned gently keeps too little of each."""
    count, size = len(diff.models), _size_of_sum(diff)
    weight = round(min(1.0, SHARE / size), 2) if size else 1.0
    if max(weight * count, 1 / (weight * count)) < LEAST_CHANGE:
        return
    yield Advice(
        f"All differences together have {100 * size:.2g} % of the base's norm: as a weighted sum, with the weight "
        f"{weight:g} each" + (f" instead of {1 / count:.2g}." if weight < 1 else ", they are small enough for that."),
        {"merge_method": "task_arithmetic", "weight_list": [weight] * count},
    )


def _solving(diff: Diff) -> Iterator[Advice]:
    """Where several experts act on each other's inputs, a method that minimizes interference; not of adapters."""
    if len(diff.models) >= SEVERAL and any(each.interference for each in diff.whole.pairs):
        yield Advice(
            f"{len(diff.models)} models act on each other's inputs: ridge makes the merge that disturbs each least. Of "
            "experts that were tuned in full it kept more than any equal weights; of LoRAs it kept less.",
            {"merge_method": "ridge"},
        )


def _size_of_sum(diff: Diff) -> float:
    """‖Στ‖ / ‖b‖; zero where there is no base to speak of."""
    norms = [each.norm for each in diff.whole.models]
    square = sum(norm * norm for norm in norms)
    square += sum((each.cosine or 0.0) * norms[each.model] * norms[each.other] for each in diff.whole.pairs)
    return float(max(square, 0.0) ** 0.5 / diff.whole.base_norm) if diff.whole.base_norm else 0.0
