"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290), in plain torch."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import LlamaForCausalLM

from demo.train.learn import Schedule, optimizers, step

Pair = tuple[list[int], list[int], list[int]]


def log_probabilities(model: LlamaForCausalLM, prompts: list[list[int]], ends: list[list[int]]) -> torch.Tensor:
    """The log-probability of each end after its prompt."""
    longest = max(len(prompt) + len(end) for prompt, end in zip(prompts, ends, strict=True))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    wanted = torch.zeros(len(prompts), longest)
    for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
        # Padding stands at the right, where causal attention cannot see it.
        ids[row, : len(prompt) + len(end)] = torch.tensor(prompt + end)
        wanted[row, len(prompt) : len(prompt) + len(end)] = 1
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids).logits
    each = -cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return (each * wanted[:, 1:]).sum(1)


def margin(model: LlamaForCausalLM, batch: list[Pair]) -> torch.Tensor:
    """By how much the model prefers the chosen end over the rejected one."""
    prompts = [pair[0] for pair in batch]
    both = log_probabilities(model, prompts * 2, [pair[1] for pair in batch] + [pair[2] for pair in batch])
    return both[: len(batch)] - both[len(batch) :]


def align(model: LlamaForCausalLM, pairs: list[Pair], schedule: Schedule, beta: float) -> None:
    """Raise each pair's margin above the one the model starts with."""
    reference = copy.deepcopy(model)
    rng = np.random.default_rng(schedule.seed)
    optims = optimizers(model, layers_only=schedule.layers_only)
    recent = 0.0
    for at in range(schedule.steps):
        batch = [pairs[int(number)] for number in rng.integers(len(pairs), size=schedule.batch)]
        with torch.no_grad():
            start = margin(reference, batch)
        gain = margin(model, batch) - start
        step(model, optims, -logsigmoid(beta * gain).mean(), schedule.at(at))
        recent = 0.95 * recent + 0.05 * gain.mean().item()
        if at % 20 == 19:
            print(f"  step {at + 1}/{schedule.steps}  margin gained {recent:.1f} nats", flush=True)
