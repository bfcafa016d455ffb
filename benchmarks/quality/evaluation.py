"""Evaluate models on rows of tokens: losses, accuracy, and shares of the experts' gain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from demo.llama import Llama, Numbers, log_probabilities

Floats = NDArray[np.float64]

#: Tokens per forward pass.
BATCH_TOKENS = 3072


@dataclass(frozen=True)
class Questions:
    """Rows of tokens, and which of them count as answers.

    Attributes:
        numbers: Token ids, int64, shape (rows, tokens).
        counted: Whether each predicted token counts, shape (rows, tokens − 1).
    """

    numbers: Numbers
    counted: NDArray[np.bool_]


@dataclass(frozen=True)
class Answers:
    """The results of a model, row by row.

    Attributes:
        losses: The mean loss of each row in nats per token, shape (rows,).
        right: The share of tokens that were predicted as the most likely ones, shape (rows,).
    """

    losses: Floats
    right: Floats


def answer(model: Llama, questions: Questions) -> Answers:
    """Evaluate a model."""
    losses, right = [], []
    for rows, counted in _batches(questions):
        logits = model.logits(rows)
        counts = counted.sum(1)
        losses.append(-np.where(counted, log_probabilities(logits, rows), 0).sum(1) / counts)
        right.append(((logits[:, :-1].argmax(-1) == rows[:, 1:]) & counted).sum(1) / counts)
    return Answers(np.concatenate(losses).astype(np.float64), np.concatenate(right).astype(np.float64))


def answer_all(folder: Path, questions: Mapping[str, Questions]) -> dict[str, Answers]:
    """Evaluate a saved model on each task."""
    model = Llama(folder)
    return {task: answer(model, each) for task, each in questions.items()}


def _batches(questions: Questions) -> Iterator[tuple[Numbers, NDArray[np.bool_]]]:
    rows = max(1, BATCH_TOKENS // questions.numbers.shape[1])
    for start in range(0, len(questions.numbers), rows):
        yield questions.numbers[start : start + rows], questions.counted[start : start + rows]


@dataclass(frozen=True)
class Known:
    """The results that merges are compared with.

    Attributes:
        base: The base's answers, by task.
        experts: The answers of each task's expert.
        general: The base's answers on its training distribution.
    """

    base: Mapping[str, Answers]
    experts: Mapping[str, Answers]
    general: Answers

    def shares(self, merged: Mapping[str, Answers]) -> dict[str, float]:
        """The share of each expert's gain over the base that a merge keeps: 1 like the expert, 0 like the base."""
        found = {}
        for task, expert in self.experts.items():
            base, own, best = (float(each.losses.mean()) for each in (self.base[task], merged[task], expert))
            found[task] = (base - own) / (base - best)
        return found

    def accuracy(self, merged: Mapping[str, Answers]) -> float:
        """The mean over the tasks of the share of correct tokens, relative to the expert's."""
        return float(
            np.mean([merged[task].right.mean() / expert.right.mean() for task, expert in self.experts.items()])
        )
