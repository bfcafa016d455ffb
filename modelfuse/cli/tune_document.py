"""The document of ``modelfuse tune --json``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from modelfuse.cli.json_output import Document

if TYPE_CHECKING:
    from modelfuse.execution.tuning import trials
    from modelfuse.execution.tuning.request import Tuned


class EvaluatedTrial(Struct, frozen=True):
    """A merge that was evaluated: its numbers, null where not finite, and the values of the searched settings."""

    trial: int
    numbers: dict[str, float | None]
    parameters: dict[str, float]


class TuneDocument(Document, frozen=True, kw_only=True):
    """The result of a search: ``modelfuse tune --json``. All trials are in the study."""

    document: Literal["tune/1"] = "tune/1"
    output_path: str
    study_path: str
    directions: dict[str, str]
    best: EvaluatedTrial
    front: list[EvaluatedTrial]
    trials: int
    seconds: float


def of_tuned(found: Tuned) -> TuneDocument:
    """The document of a search."""
    return TuneDocument(
        output_path=str(found.output_path),
        study_path=str(found.study_path),
        directions={name: "maximize" if upward else "minimize" for name, upward in found.directions.items()},
        best=_trial(found.best),
        front=[_trial(each) for each in found.front],
        trials=len(found.trials),
        seconds=found.seconds,
    )


def _trial(found: trials.Trial) -> EvaluatedTrial:
    numbers = {name: number if math.isfinite(number) else None for name, number in found.numbers.items()}
    return EvaluatedTrial(found.number, numbers, dict(found.parameters))
