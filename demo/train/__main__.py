"""Train all the models: ``python -m demo.train [FOLDER] [NAME ...]``, a model or all of them.

Needs torch and transformers. One thread, so that the same machine gives the same models.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from demo.tokenizer import Tokenizer
from demo.train.align import align
from demo.train.data import DOMAINS, GENERAL, preference_tokens, tokens
from demo.train.learn import Schedule, fresh, learn, load, save
from demo.train.make_tokenizer import learn as learn_tokenizer

MODELS = Path(__file__).parent.parent / "models"
# Twice up and down: the second round starts from what the first wrote.
BASE = (Schedule(steps=900, rate=4e-3), Schedule(steps=900, rate=2.5e-3, seed=1))
EXPERTS = {
    "code": Schedule(steps=200, rate=3e-4, layers_only=True),
    "prose": Schedule(steps=200, rate=3e-4, layers_only=True),
    "arithmetic": Schedule(steps=450, rate=4e-4, layers_only=True),
}
ALIGNED = Schedule(steps=160, rate=8e-4, layers_only=True)
BETA = 0.1


def train_base(folder: Path) -> None:
    """The model that all others start from, and its tokenizer."""
    learn_tokenizer(folder)
    tokenizer = Tokenizer(folder / "tokenizer.json")
    rows = [tokens(domain, tokenizer) for domain in GENERAL]
    model = fresh(seed=0)
    for schedule in BASE:
        learn(model, rows, schedule)
        save(model, folder)
        model = load(folder)


def train(name: str, folder: Path, base: Path) -> None:
    """An expert or the aligned model, from the base."""
    tokenizer = Tokenizer(base / "tokenizer.json")
    model = load(base)
    if name == "aligned":
        align(model, preference_tokens(tokenizer), ALIGNED, BETA)
    else:
        learn(model, [tokens(name, tokenizer)], EXPERTS[name])
    save(model, folder)
    for file in base.glob("tokenizer*.json"):
        shutil.copy(file, folder)


def main() -> None:
    """Train the models named, or all."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else MODELS
    for name in sys.argv[2:] or ("base", *DOMAINS, "aligned"):
        print(name, flush=True)
        if name == "base":
            train_base(folder / name)
        else:
            train(name, folder / name, folder / "base")


if __name__ == "__main__":
    main()
