"""Look for the experts' weights on held-out text that the demo does not judge on.

    python -m demo.tune

Merges the experts linearly with weights from a grid. Of what each expert gained over the base in its own domain a merge
keeps a share; the best merge is the one whose smallest share is the largest. What came out stands in ``recipes.py`` and
is used for every method.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path

from demo.evaluate import Score
from demo.recipes import EXPERTS, Merge
from demo.run import SHIPPED, judge, merge_all

#: Equal shares are far below what is tried: the experts' differences hardly overlap, so they may be added up.
GRID = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
WINDOWS = 30
SHOWN = 5


def kept(merged: Score, marks: dict[str, Score]) -> dict[str, float]:
    """The share of each expert's gain, in nats, that a merge keeps, by domain.

    Args:
        merged: The merge's marks.
        marks: Those of the base and of the experts, by name.
    """

    def loss(score: Score, domain: str) -> float:
        return math.log(float(getattr(score, domain)))

    return {
        domain: (loss(marks["base"], domain) - loss(merged, domain))
        / (loss(marks["base"], domain) - loss(marks[domain], domain))
        for domain in EXPERTS
    }


def shares() -> dict[tuple[float, ...], dict[str, float]]:
    """What the merge with each combination of weights keeps, on the texts for tuning."""
    merges = {f"linear {weights}": weights for weights in itertools.product(GRID, repeat=len(EXPERTS))}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: SHIPPED / name for name in ("base", *EXPERTS)}
        settings = {"merge_method": "linear", "normalize": False}
        merge_all(
            [Merge(name, EXPERTS, {**settings, "weight_list": list(each)}) for name, each in merges.items()],
            folders,
            Path(scratch),
        )
        marks = judge(folders, (WINDOWS, 0), tuning=True)
    return {weights: kept(marks[name], marks) for name, weights in merges.items()}


def main() -> None:
    """Print the best."""
    best = sorted(shares().items(), key=lambda entry: min(entry[1].values()), reverse=True)
    for weights, share in best[:SHOWN]:
        print(weights, "keeps", ", ".join(f"{value:.1%} of {domain}" for domain, value in share.items()))


if __name__ == "__main__":
    main()
