"""What ``modelfuse tune --json`` writes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from modelfuse.cli.json_output import Document

if TYPE_CHECKING:
    from modelfuse.execution.tuning import trials
    from modelfuse.execution.tuning.request import Tuned


class Trial(Struct, frozen=True):
    """A merge that was evaluated: its numbers (null where one was none), and the settings that were searched."""

    trial: int
    numbers: dict[str, float | None]
    parameters: dict[str, float]


class Tune(Document, frozen=True, kw_only=True):
    """What a search has found: ``modelfuse tune --json``; all trials are in the study."""

    document: Literal["tune/1"] = "tune/1"
    output_path: str
    study_path: str
    directions: dict[str, str]
    best: Trial
    front: list[Trial]
    trials: int
    seconds: float


def of_tuned(found: Tuned) -> Tune:
    """The document of ``tune``."""
    return Tune(
        output_path=str(found.output_path),
        study_path=str(found.study_path),
        directions={name: "maximize" if upward else "minimize" for name, upward in found.directions.items()},
        best=_trial(found.best),
        front=[_trial(each) for each in found.front],
        trials=len(found.trials),
        seconds=found.seconds,
    )


def _trial(found: trials.Trial) -> Trial:
    numbers = {name: number if math.isfinite(number) else None for name, number in found.numbers.items()}
    return Trial(found.number, numbers, dict(found.parameters))
