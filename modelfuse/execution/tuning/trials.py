"""A trial, and its form in an Optuna study."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from modelfuse.execution.tuning.evaluation import Numbers
from modelfuse.execution.tuning.search_space import Dimension

#: User attributes of a trial: its numbers, its times, and its gradient.
GIVEN, MERGING, EVALUATING, SLOPES = "numbers", "merge_seconds", "evaluation_seconds", "gradient"


@dataclass(frozen=True, slots=True)
class Trial:
    """A merge that was or will be evaluated.

    Attributes:
        number: Its number, from 0 on; trial 0 is the recipe without changes.
        parameters: The point: a number for each dimension, by name.
        numbers: The results of the evaluation, by name; empty before.
        seconds: The time that merging and evaluating took, in seconds.
        gradient: The gradient of the logarithm of its number, by the names of the dimensions; empty if not computed.
    """

    number: int
    parameters: Mapping[str, float]
    numbers: Mapping[str, float]
    seconds: tuple[float, float] = (0.0, 0.0)
    gradient: Mapping[str, float] = field(default_factory=dict)


def load_optuna() -> Any:
    """The module ``optuna``, with its log messages off."""
    optuna = import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def distribution_of(each: Dimension) -> Any:
    """Optuna's distribution of a dimension."""
    optuna = load_optuna()
    if each.whole:
        return optuna.distributions.IntDistribution(int(each.low), int(each.high), log=each.log)
    return optuna.distributions.FloatDistribution(each.low, each.high, log=each.log)


def suggest(trial: Any, each: Dimension) -> None:
    """Have Optuna draw a dimension's number for one of its trials."""
    if each.whole:
        trial.suggest_int(each.name, int(each.low), int(each.high), log=each.log)
    else:
        trial.suggest_float(each.name, each.low, each.high, log=each.log)


def optuna_parameter(each: Dimension, number: float) -> float | int:
    """The parameter that Optuna stores for a dimension's number."""
    return round(number) if each.whole else number


def optuna_value(number: float, upward: bool) -> float:
    """The value that Optuna stores for a number: NaN and infinities become the worst value."""
    return number if math.isfinite(number) else -math.inf if upward else math.inf


def attributes_of(trial: Trial) -> dict[str, object]:
    """The user attributes of a trial: all that Optuna does not store by itself."""
    numbers = {name: number if math.isfinite(number) else str(number) for name, number in trial.numbers.items()}
    own = {GIVEN: numbers, MERGING: trial.seconds[0], EVALUATING: trial.seconds[1]}
    return {**own, SLOPES: dict(trial.gradient)} if trial.gradient else own


def trial_of(found: Any, parameters: Mapping[str, float]) -> Trial:
    """The trial of one of Optuna's, with parameters that were read before."""
    numbers: Numbers = {}
    with suppress(KeyError, AttributeError, ValueError):
        numbers = {name: float(value) for name, value in found.user_attrs[GIVEN].items()}
    seconds = (float(found.user_attrs.get(MERGING, 0)), float(found.user_attrs.get(EVALUATING, 0)))
    return Trial(found.number, parameters, numbers, seconds, found.user_attrs.get(SLOPES, {}))
