"""Create small models and adapters without torch, and the differences that the adapters represent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from conftest import Stored, make_model, save_file

Tensors = dict[str, np.ndarray]
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False,
          "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
#: Shapes [out, in]; k_proj and v_proj are square.
SHAPES = {
    "model.embed_tokens.weight": (13, 8),
    "model.layers.0.self_attn.q_proj.weight": (16, 8),
    "model.layers.0.self_attn.k_proj.weight": (8, 8),
    "model.layers.0.self_attn.v_proj.weight": (8, 8),
    "model.layers.0.self_attn.q_proj.bias": (16,),
    "model.layers.0.mlp.up_proj.weight": (10, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 10),
    "model.norm.weight": (8,),
    "lm_head.weight": (13, 8),
}
Q, UP, DOWN = (f"model.layers.0.{part}" for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"))


def noise(seed: int, shape: tuple[int, ...], size: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(np.float32)


def make_base(folder: Path, *, shapes: Mapping[str, tuple[int, ...]] = SHAPES, **options: Any) -> tuple[Path, Tensors]:
    tensors = {name: noise(seed, shape) for seed, (name, shape) in enumerate(shapes.items())}
    return make_model(folder, tensors, **{"config": CONFIG, **options}), tensors


def factors(seed: int, out: int, into: int, rank: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """A and B as PEFT stores them."""
    return noise(seed, (rank, into), 0.3), noise(seed + 1000, (out, rank), 0.3)


def make_peft(
    folder: Path, tensors: Mapping[str, np.ndarray | Stored], *, prefix: str = "base_model.model.", **config: Any
) -> Path:
    folder.mkdir(parents=True)
    save_file(folder / "adapter_model.safetensors", {prefix + name: each for name, each in tensors.items()})
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def make_paddle(folder: Path, tensors: Mapping[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(folder / "peft_model.safetensors", tensors, {"format": "np"})
    (folder / "lora_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 3, **config}))
    return folder


def lora(module: str, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of a LoRA layer by PEFT's names, without the prefix."""
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def adapter_of(folder: Path, seed: int, *modules: str, **config: Any) -> tuple[Path, Tensors]:
    """Create a PEFT adapter of some modules; returns it and scale·B·A of each, by the name of the weight."""
    tensors: Tensors = {}
    deltas: Tensors = {}
    for number, module in enumerate(modules):
        a, b = factors(seed + number, *SHAPES[f"{module}.weight"])
        tensors |= lora(module, a, b)
        deltas[f"{module}.weight"] = np.float32(1.5) * (b @ a)
    return make_peft(folder, tensors, **config), deltas
