"""The tasks of the hard regime: short sequences of symbols that are transformed by rules.

A row is six symbols, ``=`` and the answer's six symbols. Every task has its own alphabet, which identifies it; an
expert is trained on rows of its task only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]

LENGTH = 6
EQUALS, END, FIRST = 0, 1, 2
SIZE = 8  # symbols of an alphabet

#: The rules, as functions of rows of symbols (numbers below SIZE), in the order of their alphabets.
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


#: Ranges of hash values, out of 20, of validation, test and training rows.
PARTS = {"validation": (0, 1), "test": (1, 2), "training": (2, 20)}


def rows(task: str, count: int, rng: np.random.Generator, part: str = "training") -> Numbers:
    """Rows of an expert's task, from one of ``PARTS``."""
    return _rows(task, np.full(count, TASKS.index(task)), rng, part)


def general(count: int, rng: np.random.Generator, part: str = "training") -> Numbers:
    """Training rows of the base: any rule with any alphabet, so that it cannot tell which rule is asked for."""
    drawn = rng.multinomial(count, np.full(len(TASKS), 1 / len(TASKS)))
    alphabets = [rng.integers(0, len(TASKS), number) for number in drawn]
    return np.concatenate([_rows(task, own, rng, part) for task, own in zip(TASKS, alphabets, strict=True)])


def part_of(given: Numbers) -> Numbers:
    """The hash value below 20 of rows of symbols, which determines their part."""
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
