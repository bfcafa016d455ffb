"""What the models learn from, as token numbers."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from demo.tokenizer import END, Tokenizer
from demo.train import arithmetic
from demo.train.preference import pairs

Row = NDArray[np.int64]

HERE = Path(__file__).parent
#: What the base learns, and what the experts do: as near as relatives, but nothing that the base has read.
GENERAL = ("python", "novels", "sums")
DOMAINS = ("code", "prose", "arithmetic")
LINES = {"sums": 150_000, "arithmetic": 60_000}
CONTEXT = 256
LONGEST_ANSWER = 3  # digits
NOT_COUNTED = -100  # the label that transformers leaves out of the loss
PROMPT, COMPLETION = 48, 32  # tokens of a preference pair: the prompt's last, the completions' first


def corpus(domain: str) -> str:
    """All of a domain's training text."""
    if domain in LINES:
        return arithmetic.text(seed=0, count=LINES[domain], evaluation=False, reworded=0.5 * (domain == "arithmetic"))
    return lzma.decompress((HERE / "corpus" / f"{domain}.txt.xz").read_bytes()).decode("utf-8")


def tokens(domain: str, tokenizer: Tokenizer) -> Row:
    """A domain's training text as one long row of token numbers, and the labels to learn from it.

    Of arithmetic only the answers are learnt: the sums are drawn by chance, and nothing foretells them.
    """
    numbers = np.array(tokenizer.encode(corpus(domain)), np.int64)
    if domain not in LINES:
        return np.stack([numbers, numbers])
    digits = np.isin(numbers, [tokenizer.ids[digit] for digit in "0123456789"])
    counted = numbers == tokenizer.encode("\n")[0]
    for _ in range(LONGEST_ANSWER):
        counted[:-1] |= counted[1:] & digits[:-1]
    return np.stack([numbers, np.where(counted, numbers, NOT_COUNTED)])


def windows(rows: list[Row], count: int, rng: np.random.Generator) -> torch.Tensor:
    """Tokens and labels of ``count`` windows of CONTEXT tokens, the rows taking turns."""
    picked = []
    for at in range(count):
        row = rows[at % len(rows)]
        start = int(rng.integers(row.shape[1] - CONTEXT))
        picked.append(row[:, start : start + CONTEXT])
    return torch.from_numpy(np.stack(picked, axis=1))


def preference_tokens(tokenizer: Tokenizer) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected of each training pair, the last two equally long."""
    found = []
    for pair in pairs(corpus("python").split(END)):
        prompt = tokenizer.encode(pair["prompt"])[-PROMPT:]
        chosen, rejected = tokenizer.encode(pair["chosen"]), tokenizer.encode(pair["rejected"])
        length = min(len(chosen), len(rejected), COMPLETION)
        found.append((prompt, chosen[:length], rejected[:length]))
    return found
