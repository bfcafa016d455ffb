"""The Llama forward pass in plain numpy: enough to judge a merged model without torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]


def read_safetensors(path: Path) -> dict[str, Floats]:
    """Every tensor of a file, as float32: an 8-byte length, a JSON header, the bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            values = (np.frombuffer(content[start:end], "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(content[start:end], {"F16": "<f2", "F32": "<f4"}[entry["dtype"]])
        tensors[name] = values.astype(np.float32).reshape(entry["shape"])
    return tensors


class Llama:
    """A checkpoint folder in the format of transformers' ``LlamaForCausalLM``."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.layers: int = config["num_hidden_layers"]
        self.heads: int = config["num_attention_heads"]
        self.groups: int = config["num_key_value_heads"]
        self.epsilon: float = config["rms_norm_eps"]
        self.head_size: int = config.get("head_dim") or config["hidden_size"] // self.heads
        self.theta: float = (config.get("rope_parameters") or config)["rope_theta"]
        self.weights: dict[str, Floats] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self.weights |= read_safetensors(path)

    def logits(self, numbers: Numbers) -> Floats:
        """For rows of token numbers, the score of every token to come next at every place."""
        x = self.weights["model.embed_tokens.weight"][numbers]
        turn = self._rotation(numbers.shape[1])
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            x = x + self._attention(name + "self_attn.", self._norm(name + "input_layernorm", x), turn)
            x = x + self._gated(name + "mlp.", self._norm(name + "post_attention_layernorm", x))
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        scores: Floats = self._norm("model.norm", x) @ head.T
        return scores

    def _norm(self, name: str, x: Floats) -> Floats:
        size = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(self.epsilon))
        normed: Floats = x / size * self.weights[name + ".weight"]
        return normed

    def _linear(self, name: str, x: Floats) -> Floats:
        product: Floats = x @ self.weights[name + ".weight"].T
        return product

    def _gated(self, name: str, x: Floats) -> Floats:
        gate = self._linear(name + "gate_proj", x)
        # x·sigmoid(x), in the form that cannot overflow.
        opened = gate * (1 + np.tanh(gate / 2)) / 2 * self._linear(name + "up_proj", x)
        return self._linear(name + "down_proj", opened)

    def _attention(self, name: str, x: Floats, turn: Floats) -> Floats:
        rows, length, _ = x.shape
        query, key, value = (
            self._linear(f"{name}{part}_proj", x).reshape(rows, length, -1, self.head_size).swapaxes(1, 2)
            for part in "qkv"
        )
        # The heads that share a key and value lie side by side.
        query = _rotate(query, turn).reshape(rows, self.groups, -1, length, self.head_size)
        key, value = _rotate(key, turn)[:, :, None], value[:, :, None]
        scores = query @ key.swapaxes(-1, -2) / np.float32(math.sqrt(self.head_size))
        scores += np.triu(np.full((length, length), -np.inf, np.float32), 1)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = scores @ value / scores.sum(-1, keepdims=True)
        together = mixed.reshape(rows, self.heads, length, self.head_size).swapaxes(1, 2)
        return self._linear(name + "o_proj", together.reshape(rows, length, -1))

    def _rotation(self, length: int) -> Floats:
        """Cosine and sine of every place's angles."""
        speeds = self.theta ** (-np.arange(0, self.head_size, 2) / self.head_size)
        angles = np.outer(np.arange(length), np.concatenate([speeds, speeds]))
        return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def _rotate(x: Floats, turn: Floats) -> Floats:
    """Turn each pair of numbers, half a head apart, by the angle of its place."""
    first, second = np.split(x, 2, axis=-1)
    rotated: Floats = x * turn[0] + np.concatenate([-second, first], axis=-1) * turn[1]
    return rotated


def log_probabilities(logits: Floats, numbers: Numbers) -> Floats:
    """The log-probability given to each token that did come next, natural logarithm."""
    logits = logits[:, :-1]
    top = logits.max(-1)
    total = top + np.log(np.exp(logits - top[..., None]).sum(-1))
    found: Floats = np.take_along_axis(logits, numbers[:, 1:, None], -1)[..., 0] - total
    return found
