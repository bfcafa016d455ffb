"""CMA-ES whose state is recomputed from the trials, so that a resumed search continues identically.

Hansen 2016, The CMA Evolution Strategy: A Tutorial, arXiv:1604.00772.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from modelfuse.execution.tuning.search_space import Dimension

#: The initial step size, as a share of the ranges.
SIGMA = 0.12
#: Initial correlation of weights of one model in different layers, and of weights of different models: at the start
#: of a search, the common size of all weights is the largest error.
SAME_MODEL, OTHER_MODEL = 0.9, 0.5
#: The least number of generations of a budget, and the least size of a population.
GENERATIONS, LEAST = 5, 4


class CmaEs:
    """Proposes the points of trials; they are numbered from 0 on, without the first trial of the recipe itself.

    Args:
        dimensions: The dimensions; at least two.
        size: The population size: trials per generation.
        seed: The seed of the draws.
    """

    def __init__(self, dimensions: Sequence[Dimension], size: int, seed: int) -> None:
        self._dimensions, self._size, self._seed = dimensions, size, seed
        self._generation = -1
        self._points: list[np.ndarray[Any, np.dtype[np.float64]]] = []
        self._strategy: Any = None

    @staticmethod
    def population(dimensions: int, budget: int) -> int:
        """The population size: 4 + ⌊3 ln n⌋, or less if the budget would allow fewer than GENERATIONS generations.

        >>> CmaEs.population(15, 40), CmaEs.population(3, 1000)
        (7, 7)
        """
        usual = 4 + int(3 * math.log(max(dimensions, 1)))
        return max(LEAST, min(usual, (budget - 1) // GENERATIONS))

    def propose(self, trial: int, losses: Mapping[int, float]) -> dict[str, float] | None:
        """The point of a trial.

        Args:
            trial: The number of the trial.
            losses: The losses of the finished trials, by number.

        Returns:
            A number for each dimension, by name; None if the previous generation is not finished.
        """
        generation, index = divmod(trial, self._size)
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
        units = self._points[index].tolist()
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
