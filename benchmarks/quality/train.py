"""Train the models of the benchmark: ``python -m benchmarks.quality.train [FOLDER]``, a few minutes on one core.

It needs torch, transformers and peft, and runs in one thread, so that a machine reproduces the models.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from demo.tokenizer import Tokenizer
from demo.train.data import tokens

from . import sequences
from .regimes import DEMO, EXPERTS, MODELS, SEEDS, WINDOW

SHAPE = LlamaConfig(
    vocab_size=sequences.VOCABULARY,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=sequences.WINDOW,
    tie_word_embeddings=True,
    bos_token_id=sequences.END,
    eos_token_id=sequences.END,
)
NOT_COUNTED = -100  # The label that transformers ignores.
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 8
WARMUP = 20

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Schedule:
    """The number of steps, the learning rate, and rows per step."""

    steps: int
    rate: float
    rows: int

    def at(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up, and a cosine decay to a tenth."""
        return self.rate * min(1.0, (step + 1) / WARMUP) * (0.55 + 0.45 * math.cos(math.pi * step / self.steps))


BASE = Schedule(steps=4000, rate=4e-3, rows=128)
EXPERT = Schedule(steps=200, rate=2e-3, rows=64)
ADAPTER = Schedule(steps=100, rate=3e-3, rows=8)


def learn(model: torch.nn.Module, batches: Iterator[Batch], schedule: Schedule) -> None:
    """Train all parameters that are not frozen."""
    parts: Iterable[torch.nn.Parameter] = [part for part in model.parameters() if part.requires_grad]
    optimizer, begun, loss = torch.optim.AdamW(parts, weight_decay=0.0, fused=True), time.monotonic(), torch.zeros(())
    for step in range(schedule.steps):
        numbers, labels = next(batches)
        loss = model(input_ids=numbers, labels=labels).loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parts, 1.0)
        optimizer.param_groups[0]["lr"] = schedule.at(step)
        optimizer.step()
        optimizer.zero_grad()
    print(f"  {schedule.steps} steps, loss {loss.item():.4f}, {time.monotonic() - begun:.0f} s", flush=True)


def _sequences(rows: Callable[[int, np.random.Generator], sequences.Numbers], count: int, seed: int) -> Iterator[Batch]:
    rng = np.random.default_rng(seed)
    while True:
        numbers = torch.from_numpy(rows(count, rng))
        labels = numbers.clone()
        labels[:, : sequences.LENGTH + 1] = NOT_COUNTED
        yield numbers, labels


def _texts(domain: str, count: int, seed: int) -> Iterator[Batch]:
    row, rng = tokens(domain, Tokenizer(DEMO / "base" / "tokenizer.json")), np.random.default_rng(seed)
    while True:
        starts = rng.integers(row.shape[1] - WINDOW, size=count)
        picked = torch.from_numpy(np.stack([row[:, start : start + WINDOW] for start in starts], axis=1))
        yield picked[0], picked[1]


def _load(folder: Path) -> LlamaForCausalLM:
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def _save(model: LlamaForCausalLM, folder: Path) -> None:
    model.bfloat16().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def hard(folder: Path) -> None:
    """Train the base and the experts of the hard regime."""
    print("base", flush=True)
    torch.manual_seed(0)
    base = LlamaForCausalLM(SHAPE)
    learn(base, _sequences(sequences.general, BASE.rows, seed=0), BASE)
    _save(base, folder / "base")
    for seed in range(1, SEEDS + 1):
        for number, task in enumerate(sequences.TASKS):
            print(task, seed, flush=True)
            model = _load(folder / "base")
            learn(model, _sequences(partial(sequences.rows, task), EXPERT.rows, seed=100 * seed + number), EXPERT)
            _save(model, folder / f"{task}-{seed}")


def lora(folder: Path) -> None:
    """Train an adapter of all Linear layers of the demo's base for each of its domains."""
    for domain in EXPERTS:
        print("lora", domain, flush=True)
        torch.manual_seed(0)
        model = get_peft_model(_load(DEMO / "base"), LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=[*LINEAR], task_type="CAUSAL_LM"
        ))  # fmt: skip
        learn(model, _texts(domain, ADAPTER.rows, seed=0), ADAPTER)
        into = folder / f"lora-{domain}"
        own: Any = model.peft_config["default"]
        own.base_model_name_or_path, own.target_modules = "demo/models/base", sorted(own.target_modules)
        model.bfloat16().save_pretrained(str(into))
        (into / "README.md").unlink(missing_ok=True)


def main() -> None:
    """Train all models of the benchmark that are not in the demo."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else MODELS
    shutil.rmtree(folder, ignore_errors=True)
    hard(folder)
    lora(folder)


if __name__ == "__main__":
    main()
