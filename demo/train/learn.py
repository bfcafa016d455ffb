"""Next-token training: the base on all domains at once, then an expert on one of them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from demo.train.data import CONTEXT, Row, windows

SHAPE = LlamaConfig(
    vocab_size=1024,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)
WARMUP = 40
DECAY = 0.1
OTHERS_RATE = 0.5  # the rate of embeddings and norms, as a share of the matrices'


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn; ``layers_only`` leaves embeddings and norms as they are."""

    steps: int
    rate: float
    batch: int = 12
    seed: int = 0
    layers_only: bool = False

    def at(self, step: int) -> float:
        """The learning rate of a step: a short rise, then half a cosine down to a tenth."""
        done = max(0.0, (step - WARMUP) / max(1, self.steps - WARMUP))
        return self.rate * min(1.0, (step + 1) / WARMUP) * (0.55 + 0.45 * math.cos(math.pi * done))


def optimizers(model: torch.nn.Module, *, layers_only: bool) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, which learns two to three times faster here, AdamW for the rest."""
    matrices = [part for name, part in model.named_parameters() if part.ndim == 2 and "embed" not in name]
    rest = [part for name, part in model.named_parameters() if part.ndim == 1 or "embed" in name]
    muon = torch.optim.Muon(matrices, weight_decay=0.0 if layers_only else DECAY, adjust_lr_fn="match_rms_adamw")
    if layers_only:
        for part in rest:
            part.requires_grad_(False)
        return [muon]
    return [muon, torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def fresh(seed: int) -> LlamaForCausalLM:
    """A model that has learnt nothing."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(SHAPE)


def load(folder: Path) -> LlamaForCausalLM:
    """A saved model, in float32 for training."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the weights in bfloat16."""
    model.bfloat16().save_pretrained(folder)


def step(model: LlamaForCausalLM, optims: list[torch.optim.Optimizer], loss: torch.Tensor, rate: float) -> None:
    """One move downhill."""
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optim, share in zip(optims, (1.0, OTHERS_RATE), strict=False):
        for group in optim.param_groups:
            group["lr"] = rate * share
        optim.step()
        optim.zero_grad()


def learn(model: LlamaForCausalLM, rows: list[Row], schedule: Schedule) -> None:
    """Train on windows drawn from rows of tokens."""
    rng = np.random.default_rng(schedule.seed)
    optims = optimizers(model, layers_only=schedule.layers_only)
    begun, recent = time.monotonic(), 0.0
    for at in range(schedule.steps):
        numbers, labels = windows(rows, schedule.batch, rng)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=numbers, labels=labels).loss
        step(model, optims, loss, schedule.at(at))
        recent = loss.item() if at == 0 else 0.98 * recent + 0.02 * loss.item()
        if at % 100 == 99:
            speed = (at + 1) * schedule.batch * CONTEXT / (time.monotonic() - begun)
            print(f"  step {at + 1}/{schedule.steps}  loss {recent:.3f}  {speed:,.0f} tokens/s", flush=True)
