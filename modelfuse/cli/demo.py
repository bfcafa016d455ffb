"""Tiny models with random weights for trying commands: a base, three fine-tunes of it and an adapter."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelfuse.checkpoints.formats.safetensors import frame_safetensors
from modelfuse.dtypes import BF16
from modelfuse.errors import OutputError

Arrays = dict[str, np.ndarray[Any, np.dtype[np.float32]]]
FINE_TUNES = ("code", "prose", "arithmetic")
WIDTH, HIDDEN, LAYERS, HEADS, END, RANK = 128, 256, 4, 4, "<|end|>", 8
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": WIDTH,
    "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2, "head_dim": WIDTH // HEADS, "max_position_embeddings": 256, "vocab_size": 257,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "bos_token_id": 256, "eos_token_id": 256, "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
}  # fmt: skip
RECIPE = """\
merge_method: dare_ties
base_model_path: {folder}/base
model_path_list: [{folder}/code, {folder}/prose, {folder}/arithmetic]
weight_list: [1.0, 0.8, 0.8]
reserve_p: 0.6
output_path: {folder}/merged-by-recipe
"""


def make_models(folder: Path) -> list[str]:
    """Write the models into a new folder; the bytes are always the same.

    Returns:
        Commands to try.

    Raises:
        OutputError: If the folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is not empty", "Give another folder: modelfuse demo FOLDER.")
    random = np.random.default_rng(0)
    base = {name: random.normal(0, 0.02, shape).astype(np.float32) for name, shape in _shapes().items()}
    base |= {name: np.ones(each.shape, np.float32) for name, each in base.items() if each.ndim == 1}
    _write_model(folder / "base", base)
    for name in FINE_TUNES:
        _write_model(folder / name, {key: _tuned(each, random) for key, each in base.items()})
    _write_adapter(folder / "lora", str(folder / "base"), random)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder.as_posix()), encoding="utf-8")
    name = shlex.quote(folder.as_posix())
    models, base_path = " ".join(f"{name}/{each}" for each in FINE_TUNES), f"--base_model_path {name}/base"
    ties = f"--merge_method ties {base_path} \\\n    --model_path_list {models}"
    return [
        f"modelfuse check {ties}",
        f"modelfuse merge {ties} \\\n    --output_path {name}/merged",
        f"modelfuse verify {name}/merged",
        f"modelfuse merge {name}/recipe.yaml",
        f"modelfuse merge {base_path} \\\n    --lora_model_path {name}/lora --output_path {name}/with-lora",
    ]


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (257, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        names = {
            "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH // 2, WIDTH),
            "self_attn.v_proj": (WIDTH // 2, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH), "mlp.down_proj": (WIDTH, HIDDEN),
            "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in names.items()}
    return shapes


def _tuned(weights: Any, random: np.random.Generator) -> Any:
    """Weights with small random changes, in place of fine-tuning."""
    scale = 0.02 if weights.ndim == 1 else 0.002
    return weights + random.normal(0, scale, weights.shape).astype(np.float32)


def _write_model(folder: Path, weights: Arrays) -> None:
    _write_weights(folder / "model.safetensors", weights)
    special = {"id": 256, "content": END, "single_word": False, "lstrip": False, "rstrip": False,
               "normalized": False, "special": True}  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer: dict[str, object] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special], "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {**_byte_letters(), END: 256}, "merges": []},
    }  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    for name, content in (("config", CONFIG), ("tokenizer", tokenizer), ("tokenizer_config", settings)):
        _write_json(folder / f"{name}.json", content)


def _byte_letters() -> dict[str, int]:
    """The character of byte-level BPE for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + at): byte for at, byte in enumerate(others)}


def _write_adapter(folder: Path, base: str, random: np.random.Generator) -> None:
    weights: Arrays = {}
    for layer in range(LAYERS):
        for name, (rows, columns) in (("q_proj", (WIDTH, WIDTH)), ("v_proj", (WIDTH // 2, WIDTH))):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = random.normal(0, 0.05, (RANK, columns)).astype(np.float32)
            weights[f"{prefix}.lora_B.weight"] = random.normal(0, 0.05, (rows, RANK)).astype(np.float32)
    _write_weights(folder / "adapter_model.safetensors", weights)
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": RANK, "lora_alpha": 2 * RANK,
              "target_modules": ["q_proj", "v_proj"], "bias": "none", "task_type": "CAUSAL_LM"}  # fmt: skip
    _write_json(folder / "adapter_config.json", config)


def _write_weights(path: Path, weights: Arrays) -> None:
    path.parent.mkdir(parents=True)
    header = frame_safetensors([(name, BF16, each.shape) for name, each in weights.items()], {"format": "pt"})
    halves = ((each.view(np.uint32) >> 16).astype("<u2").tobytes() for each in weights.values())
    path.write_bytes(header.pieces[0][1] + b"".join(halves))


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
