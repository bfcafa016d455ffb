"""What is to be searched, and what a search has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modelfuse.errors import RecipeError
from modelfuse.execution.tuning.evaluation import Evaluation
from modelfuse.execution.tuning.study import SAMPLERS, Trial
from modelfuse.recipe.checks import shown

MINIMIZE, MAXIMIZE = "minimize", "maximize"


@dataclass(frozen=True)
class Request:
    """What is to be searched, and how.

    Attributes:
        settings: The recipe, with or without marks.
        evaluation: Tells how good a merge is.
        budget: How many merges are evaluated in all, those of earlier runs of the same request included.
        groups: Parts of the depth with weights of their own; 0: none.
        attention_apart: Whether attention and MLP of each are groups of their own.
        direction: ``minimize`` or ``maximize`` for all numbers, or ``NAME=maximize`` for some.
        sampler: What proposes.
        jobs: How many evaluations run at a time.
        scratch: Where merged models stand while they are evaluated; None: on a RAM disk, or beside the study.
    """

    settings: Mapping[str, object]
    evaluation: Evaluation
    budget: int = 40
    groups: int = 0
    attention_apart: bool = False
    direction: Sequence[str] = (MINIMIZE,)
    sampler: str = "auto"
    jobs: int = 1
    scratch: Path | None = None

    def is_upward(self, name: str) -> bool:
        """Whether more is better of a number."""
        words = {word.rpartition("=")[0]: word.rpartition("=")[2] for word in self.direction}
        return words.get(name, words.get("", MINIMIZE)) == MAXIMIZE

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            RecipeError: Saying what.
        """
        for name, least in (("budget", 1), ("jobs", 1), ("groups", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"{name} is {getattr(self, name)}: it should be at least {least}")
        if self.sampler not in SAMPLERS:
            raise RecipeError(f"sampler is {shown(self.sampler)}", f"Give one of {', '.join(SAMPLERS)}.")
        if self.attention_apart and not self.groups:
            raise RecipeError("attention_apart splits groups of layers, but groups is not given", "Add --groups 2.")
        for word in self.direction:
            if word.rpartition("=")[2] not in (MINIMIZE, MAXIMIZE):
                raise RecipeError(
                    f"direction is {shown(word)}",
                    f"Give {MINIMIZE} or {MAXIMIZE}, or NAME={MAXIMIZE} for a number of that name.",
                )


@dataclass(frozen=True)
class Tuned:
    """What a search has found.

    Attributes:
        output_path: Where the best merge is.
        study_path: The folder of the study.
        best: The best trial; of several numbers, the one with the best first number among ``front``.
        front: The trials that no other is better than in every number.
        trials: All trials in order; the first is the recipe as it was.
        settings: The settings of the best merge: a recipe.
        directions: For each number, whether more is better.
        seconds: Wall time.
    """

    output_path: Path
    study_path: Path
    best: Trial
    front: tuple[Trial, ...]
    trials: tuple[Trial, ...]
    settings: Mapping[str, object] = field(repr=False)
    directions: Mapping[str, bool]
    seconds: float

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name} {number:.6g}" for name, number in self.best.numbers.items())
        return f"<Tuned: {numbers} by trial {self.best.number} of {len(self.trials)}; {self.output_path}>"
