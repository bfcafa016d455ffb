"""How good a model is: at each domain, at sums, and by the preference."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from demo.llama import Floats, Llama, Numbers, log_probabilities
from demo.tokenizer import Tokenizer

Flags = NDArray[np.bool_]

HELD_OUT = Path(__file__).parent / "heldout"
DOMAINS = ("code", "prose", "arithmetic")
WINDOW = 192
PROMPT, COMPLETION = 48, 32  # tokens of a preference pair: the prompt's last, the completions' first
BATCH = 16


@dataclass(frozen=True)
class Score:
    """A model's marks on text that no model was trained on.

    Perplexities are per token; that of arithmetic counts the answers only, as the sums themselves are
    drawn by chance. ``sums`` and ``preference`` are the shares of right answers and of pairs in which
    the documented function is the likelier one.
    """

    code: float
    prose: float
    arithmetic: float
    sums: float
    preference: float

    @property
    def average(self) -> float:
        """The geometric mean of the perplexities, that is the mean loss."""
        return math.exp(sum(math.log(getattr(self, domain)) for domain in DOMAINS) / len(DOMAINS))

    def rounded(self) -> dict[str, float]:
        """The marks as they are written down."""
        return {name: round(value, 4) for name, value in (asdict(self) | {"average": self.average}).items()}


@dataclass(frozen=True)
class Passage:
    """Rows of tokens, which of the tokens to come count, and where whole answers lie: row, start, end."""

    numbers: Numbers
    counted: Flags
    answers: tuple[tuple[int, int, int], ...] = ()


class Exam:
    """The held-out texts, read once for all models.

    Args:
        tokenizer: The models' tokenizer.
        windows: How many windows of each domain, spread over its half of the text.
        pairs: How many preference pairs; none: no preference is told.
        tuning: Whether to take the first half of every text, for choosing settings; models are judged on the second.
    """

    def __init__(self, tokenizer: Tokenizer, windows: int, pairs: int, tuning: bool = False) -> None:
        self.passages = {domain: self._passage(tokenizer, domain, windows, tuning) for domain in DOMAINS}
        self.pairs = self._pairs(tokenizer, pairs)

    def score(self, model: Llama) -> Score:
        """All marks of one model."""
        losses, sums = {}, 0.0
        for domain, passage in self.passages.items():
            chances, right = _read(model, passage.numbers)
            losses[domain] = math.exp(-chances[passage.counted].mean())
            if domain == "arithmetic":
                sums = float(np.mean([right[row, start:end].all() for row, start, end in passage.answers]))
        preference = math.nan
        if len(self.pairs.numbers):
            chances, _ = _read(model, self.pairs.numbers)
            totals = np.where(self.pairs.counted, chances, 0).sum(1)
            preference = float((totals[0::2] > totals[1::2]).mean())
        return Score(**losses, sums=sums, preference=preference)

    @staticmethod
    def _passage(tokenizer: Tokenizer, domain: str, windows: int, tuning: bool) -> Passage:
        numbers = np.array(tokenizer.encode((HELD_OUT / f"{domain}.txt").read_text(encoding="utf-8")), np.int64)
        whole = numbers[: len(numbers) // WINDOW * WINDOW].reshape(-1, WINDOW)
        whole = whole[: len(whole) // 2] if tuning else whole[len(whole) // 2 :]
        picked = whole[np.linspace(0, len(whole) - 1, min(windows, len(whole))).round().astype(int)]
        if domain != "arithmetic":
            return Passage(picked, np.ones((len(picked), WINDOW - 1), np.bool_))
        answers = tuple((at, *span) for at, row in enumerate(picked) for span in _answers(tokenizer, row))
        counted = np.zeros((len(picked), WINDOW - 1), np.bool_)
        for at, start, end in answers:
            counted[at, start:end] = True
        return Passage(picked, counted, answers)

    @staticmethod
    def _pairs(tokenizer: Tokenizer, count: int) -> Passage:
        numbers = np.zeros((2 * count, PROMPT + COMPLETION), np.int64)
        counted = np.zeros((2 * count, PROMPT + COMPLETION - 1), np.bool_)
        lines = (HELD_OUT / "preference.jsonl").read_text(encoding="utf-8").splitlines()
        for at, line in enumerate(lines[:count]):
            pair = json.loads(line)
            prompt = tokenizer.encode(pair["prompt"])[-PROMPT:]
            ends = [tokenizer.encode(pair[side]) for side in ("chosen", "rejected")]
            length = min(COMPLETION, *map(len, ends))
            for row, end in zip((2 * at, 2 * at + 1), ends, strict=True):
                numbers[row, : len(prompt) + length] = prompt + end[:length]
                counted[row, len(prompt) - 1 : len(prompt) + length - 1] = True
        return Passage(numbers, counted)


def _answers(tokenizer: Tokenizer, row: Numbers) -> Iterator[tuple[int, int]]:
    """Where, among the tokens to come, whole answers lie: the digits that end a line, and its end."""
    words = [tokenizer.decode([int(number)]) for number in row]
    lines = [at for at, word in enumerate(words) if word == "\n"]
    for end in lines[1:]:
        start = end
        while words[start - 1].isdigit():
            start -= 1
        yield start - 1, end


def _read(model: Llama, numbers: Numbers) -> tuple[Floats, Flags]:
    """For each token to come: its log-probability, and whether it was the likeliest."""
    chances, right = [], []
    for start in range(0, len(numbers), BATCH):
        batch = numbers[start : start + BATCH]
        logits = model.logits(batch)
        chances.append(log_probabilities(logits, batch))
        right.append(logits[:, :-1].argmax(-1) == batch[:, 1:])
    return np.concatenate(chances), np.concatenate(right)
