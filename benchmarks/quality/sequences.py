"""Tasks of short sequences, made by rules: what the hard regime's models learn and are judged on.

A row is six symbols, ``=`` and the answer's six symbols. Every task has an alphabet of its own, so that its rows can be
told from all others; an expert sees those of its task only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]

LENGTH = 6
EQUALS, END, FIRST = 0, 1, 2
SIZE = 8  # symbols of an alphabet

#: What becomes of rows of symbols, numbers below SIZE. An alphabet belongs to each, in this order.
RULES: dict[str, Callable[[Numbers], Numbers]] = {
    "sort": lambda x: np.sort(x, axis=1),
    "reverse": lambda x: x[:, ::-1],
    "shift": lambda x: (x + 3) % SIZE,
    "swap": lambda x: x.reshape(len(x), LENGTH // 2, 2)[:, :, ::-1].reshape(x.shape),
    "highest": lambda x: np.maximum.accumulate(x, axis=1),
    "difference": lambda x: (x - np.roll(x, 1, axis=1)) % SIZE,
}
TASKS = tuple(RULES)
VOCABULARY = FIRST + SIZE * len(TASKS)
WINDOW = 2 * LENGTH + 2


#: Of twenty rows of symbols, one is for choosing λ by, and another one for judging by; no model has seen them.
PARTS = {"validation": (0, 1), "test": (1, 2), "training": (2, 20)}


def rows(task: str, count: int, rng: np.random.Generator, part: str = "training") -> Numbers:
    """Rows of an expert's task, of one of ``PARTS``."""
    return _rows(task, np.full(count, TASKS.index(task)), rng, part)


def general(count: int, rng: np.random.Generator, part: str = "training") -> Numbers:
    """Rows that the base learns from: any rule with any alphabet, so that it knows how to do everything, not when."""
    drawn = rng.multinomial(count, np.full(len(TASKS), 1 / len(TASKS)))
    alphabets = [rng.integers(0, len(TASKS), number) for number in drawn]
    return np.concatenate([_rows(task, own, rng, part) for task, own in zip(TASKS, alphabets, strict=True)])


def part_of(given: Numbers) -> Numbers:
    """The number, below 20, that says which part rows of symbols belong to."""
    number = given @ SIZE ** np.arange(LENGTH)
    mixed: Numbers = (number * 2654435761 % 2**32 >> 16) % 20
    return mixed


def _rows(rule: str, alphabets: Numbers, rng: np.random.Generator, part: str) -> Numbers:
    first_part, stop = PARTS[part]
    given = np.empty((0, LENGTH), np.int64)
    while len(given) < len(alphabets):
        drawn = rng.integers(0, SIZE, (len(alphabets), LENGTH))
        given = np.concatenate([given, drawn[(part_of(drawn) >= first_part) & (part_of(drawn) < stop)]])
    given, first = given[: len(alphabets)], FIRST + SIZE * alphabets[:, None]
    made = np.full((len(alphabets), WINDOW), EQUALS)
    made[:, :LENGTH] = first + given
    made[:, LENGTH + 1 : -1] = first + RULES[rule](given)
    made[:, -1] = END
    return made
