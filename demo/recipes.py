"""What the demo merges: names, and the settings that `modelfuse.merge` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MODELS = ("base", "code", "prose", "arithmetic", "aligned")
EXPERTS = ("code", "prose", "arithmetic")


@dataclass(frozen=True)
class Merge:
    """One merge: of models of the demo or of earlier merges, by name.

    Args:
        name: What the tables call it; also the name of its folder.
        models: What is merged.
        settings: The method and its settings.
        base: The model they were fine-tuned from, if the method should see it.
        shown: Whether it is in the tables or only a step towards another merge.
    """

    name: str
    models: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    base: str | None = "base"
    shown: bool = True


# Where three differences to the base stand at right angles, as experts' nearly do, this much of the third
# makes all count alike: sin(90°·α) = cos(90°·α)·sin(45°).
THIRD = 0.392


def _weighted(name: str, **settings: Any) -> Merge:
    return Merge(name, EXPERTS, {"weight_list": WEIGHTS, "normalize": False, **settings})


def _in_turn(name: str, **settings: Any) -> list[Merge]:
    """Slerp takes two models, so three are merged in two steps."""
    first = Merge(f"{name}, first two", EXPERTS[:2], {"slerp_alpha": 0.5, **settings}, shown=False)
    return [first, Merge(name, (first.name, EXPERTS[2]), {"slerp_alpha": THIRD, **settings})]


# The same for all methods, so that they differ in nothing else. Sums are all or nothing, so the third
# expert keeps most of its difference to the base. Found by demo/tune.py.
WEIGHTS = [0.6, 0.7, 0.9]
DENSITY = 0.7

DOMAIN_MERGES = [
    Merge("linear, equal shares", EXPERTS, {"merge_method": "linear"}),
    _weighted("linear", merge_method="linear"),
    *_in_turn("slerp", merge_method="slerp"),
    *(
        _weighted(method, merge_method=method, reserve_p=DENSITY)
        for method in ("ties", "dare_linear", "dare_ties", "della_linear", "della")
    ),
    *_in_turn("trim + slerp", merge_type="slerp", sparsify_type="trim", reserve_p=DENSITY),
]

STEPS = 8
#: The experts' merge that the second part goes on with.
CHOSEN = "linear"


def towards_aligned() -> list[Merge]:
    """From the base to the aligned model in a straight line; the ends are the models themselves."""
    return [
        Merge(
            f"{at}/{STEPS} aligned, rest base",
            ("base", "aligned"),
            {"merge_method": "linear", "weight_list": [1 - at / STEPS, at / STEPS]},
            base=None,
        )
        for at in range(1, STEPS)
    ]


def with_aligned() -> list[Merge]:
    """More and more of what alignment changed, added to the experts' merge."""
    return [
        Merge(
            f"{CHOSEN} and {at}/{STEPS} aligned",
            (CHOSEN, "aligned"),
            {"merge_method": "linear", "weight_list": [1, at / STEPS], "normalize": False},
        )
        for at in range(1, STEPS + 1)
    ]


def paths() -> dict[str, list[str]]:
    """The second part's two series, by title: models and merges from no alignment to all of it."""
    return {
        "The base turns into the aligned model": ["base", *(merge.name for merge in towards_aligned()), "aligned"],
        "The experts' merge takes alignment in": [CHOSEN, *(merge.name for merge in with_aligned())],
    }
