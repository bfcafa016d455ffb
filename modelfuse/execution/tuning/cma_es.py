"""CMA-ES, whose state follows from the trials alone: nothing of it is stored, and another run goes on with the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from modelfuse.execution.tuning.search_space import Dimension

#: The first step's size, as a share of the ranges.
SIGMA = 0.12
#: How much weights of one model in different layers go together at first, and those of different models: what is
#: wrong first of all is how large they are.
SAME_MODEL, OTHER_MODEL = 0.9, 0.5
#: Generations that a budget should have; and the least that one may consist of.
GENERATIONS, LEAST = 5, 4


class CmaEs:
    """What to try next, given what was found; numbers of trials count from the first after the start.

    Args:
        dimensions: What is searched; more than one.
        size: Trials a generation.
        seed: What the draws depend on.
    """

    def __init__(self, dimensions: Sequence[Dimension], size: int, seed: int) -> None:
        self._dimensions, self._size, self._seed = dimensions, size, seed
        self._generation = -1
        self._points: list[np.ndarray[Any, np.dtype[np.float64]]] = []
        self._strategy: Any = None

    @staticmethod
    def population(dimensions: int, budget: int) -> int:
        """Trials a generation: the usual number, less where the budget would not allow some generations.

        >>> CmaEs.population(15, 40), CmaEs.population(3, 1000)
        (7, 7)
        """
        usual = 4 + int(3 * math.log(max(dimensions, 1)))
        return max(LEAST, min(usual, (budget - 1) // GENERATIONS))

    def propose(self, trial: int, losses: Mapping[int, float]) -> dict[str, float] | None:
        """The point of a trial.

        Args:
            trial: Its number.
            losses: What was found, by the number of the trial.

        Returns:
            A number of each dimension; None while the generation before is not whole.
        """
        generation, place = divmod(trial, self._size)
        while self._generation < generation:
            if self._strategy is None:
                self._begin()
            else:
                first = self._generation * self._size
                found = [losses.get(first + at) for at in range(self._size)]
                if any(each is None for each in found):
                    return None
                self._strategy.tell(list(zip(self._points, found, strict=True)))
            self._points = [self._strategy.ask() for _ in range(self._size)]
            self._generation += 1
        units = self._points[place].tolist()
        return {each.name: each.from_unit(unit) for each, unit in zip(self._dimensions, units, strict=True)}

    def _begin(self) -> None:
        count = len(self._dimensions)
        self._strategy = import_module("cmaes").CMA(
            mean=np.array([each.to_unit(each.start) for each in self._dimensions]),
            sigma=SIGMA,
            cov=_covariance(self._dimensions),
            bounds=np.array([[0.0, 1.0]] * count),
            seed=self._seed,
            population_size=self._size,
        )


def _covariance(dimensions: Sequence[Dimension]) -> np.ndarray[Any, np.dtype[np.float64]]:
    found = np.eye(len(dimensions))
    for at, one in enumerate(dimensions):
        for beside, other in enumerate(dimensions[:at]):
            if one.model and other.model:
                found[at, beside] = found[beside, at] = SAME_MODEL if one.model == other.model else OTHER_MODEL
    return found
