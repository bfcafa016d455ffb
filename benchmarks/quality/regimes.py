"""The regimes: a base, experts of tasks, and validation and test questions of each task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from demo.evaluate import HELD_OUT
from demo.llama import Numbers
from demo.tokenizer import Tokenizer

from . import sequences
from .evaluation import Questions

MODELS = Path(__file__).parent / "models"
DEMO = Path(__file__).parents[2] / "demo" / "models"
SEEDS = 3

#: Texts: tokens per window, and windows per task.
WINDOW, VALIDATION, TEST = 128, 8, 24
#: Most digits of an answer.
LONGEST_ANSWER = 3
#: Sequences: rows per task.
VALIDATION_ROWS, TEST_ROWS = 150, 400


@dataclass(frozen=True)
class Regime:
    """A base, experts, and questions.

    Attributes:
        name: The name.
        title: A short description.
        base: The base's folder.
        experts: A set of experts for each seed: folders by task.
        adapters: Whether experts are adapters.
    """

    name: str
    title: str
    base: Path
    experts: tuple[Mapping[str, Path], ...]
    adapters: bool = False

    @cached_property
    def validation(self) -> Mapping[str, Questions]:
        """The questions that λ is chosen on, by task."""
        if self.name == "hard":
            return _sequences("validation", VALIDATION_ROWS)
        return {task: _text(task, first_half=True, count=VALIDATION) for task in self.experts[0]}

    @cached_property
    def test(self) -> Mapping[str, Questions]:
        """The questions that results are reported on, by task."""
        if self.name == "hard":
            return _sequences("test", TEST_ROWS)
        return {task: _text(task, first_half=False, count=TEST) for task in self.experts[0]}

    @cached_property
    def general(self) -> Questions:
        """Held-out questions of the base's training distribution."""
        if self.name == "hard":
            return _counted(sequences.general(TEST_ROWS, np.random.default_rng(0), "test"))
        return _python()


def _sequences(part: str, count: int) -> dict[str, Questions]:
    rng = np.random.default_rng(0)
    return {task: _counted(sequences.rows(task, count, rng, part)) for task in sequences.TASKS}


def _counted(rows: Numbers) -> Questions:
    counted = np.zeros((len(rows), rows.shape[1] - 1), np.bool_)
    counted[:, sequences.LENGTH :] = True
    return Questions(rows, counted)


def _tokenizer() -> Tokenizer:
    return Tokenizer(DEMO / "base" / "tokenizer.json")


def _text(task: str, *, first_half: bool, count: int) -> Questions:
    """Windows of a held-out text of the demo; in sums, only the answers count."""
    numbers = np.array(_tokenizer().encode((HELD_OUT / f"{task}.txt").read_text(encoding="utf-8")), np.int64)
    whole = numbers[: len(numbers) // WINDOW * WINDOW].reshape(-1, WINDOW)
    whole = whole[: len(whole) // 2] if first_half else whole[len(whole) // 2 :]
    picked = whole[np.linspace(0, len(whole) - 1, count).round().astype(int)]
    return Questions(picked, _answers_of(picked) if task == "arithmetic" else np.ones((count, WINDOW - 1), np.bool_))


def _answers_of(rows: Numbers) -> NDArray[np.bool_]:
    """Whether each predicted token is one of the digits at the end of a line, or the line's end."""
    tokenizer = _tokenizer()
    counted = rows == tokenizer.encode("\n")[0]
    digits = np.isin(rows, [tokenizer.ids[digit] for digit in "0123456789"])
    for _ in range(LONGEST_ANSWER):
        counted[:, :-1] |= counted[:, 1:] & digits[:, :-1]
    found: NDArray[np.bool_] = counted[:, 1:]
    return found


def _python() -> Questions:
    """Functions of packages that are in no training data of the demo."""
    lines = (HELD_OUT / "preference.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    numbers = np.array(_tokenizer().encode("\n".join(each["prompt"] + each["rejected"] for each in pairs)), np.int64)
    rows = numbers[: len(numbers) // WINDOW * WINDOW].reshape(-1, WINDOW)[:TEST]
    return Questions(rows, np.ones((len(rows), WINDOW - 1), np.bool_))


EXPERTS = ("code", "prose", "arithmetic")
REGIMES = (
    Regime("demo", "three language models, slightly fine-tuned", DEMO / "base",
           ({task: DEMO / task for task in EXPERTS},)),
    Regime(
        "hard",
        "six experts of separate tasks, strongly fine-tuned",
        MODELS / "base",
        tuple({task: MODELS / f"{task}-{seed}" for task in sequences.TASKS} for seed in range(1, SEEDS + 1)),
    ),
    Regime("lora", "three LoRA adapters of one base", DEMO / "base",
           ({task: MODELS / f"lora-{task}" for task in EXPERTS},), adapters=True),
)  # fmt: skip
