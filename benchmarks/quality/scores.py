"""Compute scores from answers: shares of the experts' gain, with bootstrap intervals of their differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from .evaluation import Floats, Known
from .merges import PLAIN, Merged

DRAWS = 1000
INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Score:
    """A method's scores in one regime, means over its sets of experts.

    Attributes:
        label: The method's name in tables.
        share: The share of the experts' gain that is kept, with the λ chosen on validation data.
        by_seed: The same for each set of experts.
        difference: The difference to task arithmetic's share.
        low: The lower end of the difference's 95 % interval, by a paired bootstrap over rows and seeds.
        high: The upper end.
        accuracy: The share of correct tokens, relative to the experts'.
        worst: The share of the task with the lowest one.
        forgotten: The increase of the loss on the base's training distribution, in nats per token.
        usual: The share with the default λ.
        factor: The chosen λ; None if the method has none.
        norm: The norm of the merged difference, relative to that of the sum of the differences.
    """

    label: str
    share: float
    by_seed: tuple[float, ...]
    difference: float
    low: float
    high: float
    accuracy: float
    worst: float
    forgotten: float
    usual: float
    factor: float | None
    norm: float | None

    def rounded(self) -> dict[str, object]:
        """The fields, rounded, for JSON."""
        found: dict[str, object] = {}
        for name, value in asdict(self).items():
            several = isinstance(value, tuple)
            found[name] = [round(each, 4) for each in value] if several else (
                round(value, 4) if isinstance(value, float) else value
            )  # fmt: skip
        return found


def scores(known: Sequence[Known], merged: Sequence[Mapping[str, Merged]]) -> list[Score]:
    """The scores of all methods, the best first.

    Args:
        known: For each set of experts, the results on test questions that merges are compared with.
        merged: For each set of experts, the results of all variants by label.
    """
    draws = {label: _draws(known, [each[label] for each in merged]) for label in merged[0]}
    base = float(known[0].general.losses.mean())
    found = []
    for label, drawn in draws.items():
        own = [each[label] for each in merged]
        shares = [one.shares(each.tuned) for one, each in zip(known, own, strict=True)]
        by_seed = [float(np.mean([*each.values()])) for each in shares]
        plain = [np.mean([*one.shares(each[PLAIN].tuned).values()]) for one, each in zip(known, merged, strict=True)]
        low, high = np.percentile(drawn - draws[PLAIN], INTERVAL)
        usual = [np.mean([*one.shares(each.usual).values()]) for one, each in zip(known, own, strict=True)]
        factors = [each.factor for each in own if each.factor is not None]
        found.append(Score(
            label=label,
            share=float(np.mean(by_seed)),
            by_seed=tuple(by_seed),
            difference=float(np.mean(by_seed) - np.mean(plain)),
            low=float(low),
            high=float(high),
            accuracy=float(np.mean([one.accuracy(each.tuned) for one, each in zip(known, own, strict=True)])),
            worst=float(np.mean([min(each.values()) for each in shares])),
            forgotten=float(np.mean([each.general.losses.mean() for each in own])) - base,
            usual=float(np.mean(usual)),
            factor=float(np.mean([factor for factor, _ in factors])) if factors else None,
            norm=float(np.mean([norm for _, norm in factors])) if factors else None,
        ))  # fmt: skip
    return sorted(found, key=lambda each: each.share, reverse=True)


def _draws(known: Sequence[Known], own: Sequence[Merged]) -> Floats:
    """Bootstrap samples of the share over rows and seeds, the same ones for every method; shape (DRAWS,)."""
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, len(own), (DRAWS, len(own)))
    by_task = []
    for task in known[0].experts:
        rows = known[0].base[task].losses.size
        counts = rng.multinomial(rows, np.full(rows, 1 / rows), size=DRAWS) / rows
        columns = [
            (counts @ (one.base[task].losses - each.tuned[task].losses))
            / (counts @ (one.base[task].losses - one.experts[task].losses))
            for one, each in zip(known, own, strict=True)
        ]
        by_task.append(np.stack(columns, axis=1))
    shares = np.mean(by_task, axis=0)
    found: Floats = np.take_along_axis(shares, seeds, axis=1).mean(axis=1)
    return found
