"""The request and the result of a search of settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modelfuse.errors import RecipeError
from modelfuse.execution.tuning.evaluation import Evaluation
from modelfuse.execution.tuning.study import SAMPLERS
from modelfuse.execution.tuning.trials import Trial
from modelfuse.recipe.checks import shown

MINIMIZE, MAXIMIZE = "minimize", "maximize"


@dataclass(frozen=True)
class TuningRequest:
    """What to search, and how.

    Attributes:
        settings: The recipe, with or without marks.
        evaluation: Evaluates merged models.
        budget: The total number of merges to evaluate, including those of earlier runs of the same request.
        groups: The number of groups of layers with weights of their own; 0: none.
        attention_apart: Whether attention and MLP of each group of layers have weights of their own.
        direction: ``minimize`` or ``maximize`` for all numbers, or ``NAME=maximize`` for some.
        sampler: One of ``SAMPLERS``.
        jobs: The number of evaluations to run at a time.
        scratch: The folder for merged models while they are evaluated; None: a RAM disk, or the study's folder.
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
        """Whether larger values of a number are better."""
        words = {word.rpartition("=")[0]: word.rpartition("=")[2] for word in self.direction}
        return words.get(name, words.get("", MINIMIZE)) == MAXIMIZE

    def check(self) -> None:
        """Check the values.

        Raises:
            RecipeError: If one is invalid.
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
    """The result of a search.

    Attributes:
        output_path: The folder of the best merge.
        study_path: The folder of the study.
        best: The best trial; with several numbers, the one of ``front`` with the best first number.
        front: The Pareto front: trials that no other trial beats in all numbers.
        trials: All evaluated trials in order; the first is the recipe without changes.
        settings: The settings of the best merge: a recipe.
        directions: For each number, whether larger is better.
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
